"""The report: what it contains, and what it must not do."""

import html.parser
import json
import math
import re

import numpy as np
import pytest
from report_case import make_run

from jaxlm.report.curves import figures, load_runs
from jaxlm.report.page import MAX_POINTS, MAX_SAMPLES, write_report

HOSTILE = (
    "</script><script>alert(1)</script><!-- {{data}} & <img src=x onerror=alert(2)>"
)


class Page(html.parser.HTMLParser):
    """Parses a page as a browser would: elements, attributes and data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts = [], [], []
        self._script = False
        self.feed(text)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._script = self._script and tag != "script"

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data


def report(runs, tmp_path):
    text = write_report(load_runs(runs), tmp_path / "out" / "report.html").read_text(
        "utf-8"
    )
    return text, Page(text)


def test_report_holds_the_data_of_each_run(tmp_path):
    a = make_run(
        tmp_path / "a",
        [3.0, 2.5, 2.25],
        evals=[(20, 2.75), (30, 2.125)],
        samples=[(20, "To be"), (30, "or not")],
    )
    b = make_run(tmp_path / "b", [3.5, 3.25], lr=2e-3)
    text, page = report([a, b], tmp_path)
    first, second = page.data["runs"]
    assert (first["name"], second["name"]) == ("a", "b")
    assert first["curves"]["train"] == {
        "step": [10, 20, 30],
        "tokens": [2560, 5120, 7680],
        "time": [1, 2, 3],
        "y": [3.0, 2.5, 2.25],
    }
    assert first["curves"]["eval"]["y"] == [2.75, 2.125]
    assert first["curves"]["eval"]["tokens"] == [5120, 7680]  # from the training rows
    assert first["samples"][1] == {"step": 30, "prompt": "> ", "text": "or not"}
    assert second["curves"]["train"]["y"] == [3.5, 3.25]
    assert second["samples"] == []
    # Only the differing fields of the config are marked.
    marked = re.findall(r'<tr class="differs"><th scope="row">([\w.]+)', text)
    assert marked == ["optimizer.learning_rate"]
    for figure in ("2.1250 at step 30", "1.0625", "10.0 %", "25.0 %", "30 of 2000"):
        assert f"<td>{figure}</td>" in text


def test_report_reaches_for_nothing(tmp_path):
    run = make_run(tmp_path / "run", [3.0, 2.0], evals=[(20, 2.5)], samples=[(20, "x")])
    text, page = report([run], tmp_path)
    assert "http:" not in text and "https:" not in text
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert not {"src", "href", "srcset", "action", "data", "style"} & names
    assert not any(name.startswith("on") for name in names)
    for word in ("@import", "url(", "fetch(", "XMLHttpRequest", "innerHTML", "eval("):
        assert word not in text.replace("url(#${clip})", ""), word
    policy = next(v for _, name, v in page.attributes if v and "default-src" in v)
    assert "default-src 'none'" in policy


def test_page_code_is_small(tmp_path):
    run = make_run(tmp_path / "run", [], config=False)
    text, _ = report([run], tmp_path)
    assert len(text.encode()) < 60_000
    # Text that cannot wrap overflows a narrow window (measured in test_browser.py).
    assert "nowrap" not in text


def test_hostile_text_is_inert(tmp_path):
    name = "<b onclick=x>&'\"{{script}}"
    run = make_run(
        tmp_path / name, [2.0], samples=[(10, HOSTILE), (20, "\u2028\ud800")]
    )
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"] = [HOSTILE, "\ud800"]
    (run / "config.json").write_text(json.dumps(config))
    text, page = report([run], tmp_path)
    assert page.tags.count("script") == 2 and "b" not in page.tags
    assert "img" not in page.tags and text.count("alert(1)") == 2  # sample, config
    assert page.data["runs"][0]["name"] == name
    assert page.data["runs"][0]["samples"][0]["text"] == HOSTILE
    assert page.data["runs"][0]["samples"][1]["text"] == "\u2028\ud800"


@pytest.mark.parametrize(
    "losses", [[], [2.0], [math.nan], [2.0, math.inf, math.nan, 1.0]]
)
def test_few_and_non_finite_rows(tmp_path, losses):
    run = make_run(tmp_path / "run", losses)
    _, page = report([run], tmp_path)
    drawn = page.data["runs"][0]["curves"]["train"]["y"]
    assert drawn == [v if math.isfinite(v) else None for v in losses]
    bad = sum(not math.isfinite(v) for v in losses)
    assert figures(load_runs([run])[0])["Rows with a non-finite loss"] == (
        str(bad) if bad else ""
    )


def test_long_runs_are_thinned_and_keep_their_spikes(tmp_path):
    losses = 2 + np.random.default_rng(0).normal(size=5000) * 0.1
    losses[1234], losses[4321], losses[777] = 50.0, -50.0, math.nan
    run = make_run(
        tmp_path / "run",
        losses,
        log_every=1,
        samples=[(i, str(i)) for i in range(2 * MAX_SAMPLES)],
        evals=[(i, 2.0) for i in range(1, 603)],
    )
    text, page = report([run], tmp_path)
    assert "102 earlier ones are left out" in text
    assert '<th scope="row">103</th>' in text and '<th scope="row">102</th>' not in text
    data = page.data["runs"][0]
    curve = data["curves"]["train"]
    assert len(curve["y"]) <= MAX_POINTS
    assert curve["y"][curve["step"].index(1235)] == 50.0
    assert curve["y"][curve["step"].index(4322)] == -50.0
    assert curve["y"][curve["step"].index(778)] is None
    assert len(curve["mean"]["y"]) <= MAX_POINTS
    assert len(data["samples"]) == MAX_SAMPLES == data["omitted"]
    assert [data["samples"][i]["step"] for i in (0, -1)] == [0, 2 * MAX_SAMPLES - 1]


def test_figures_without_config_or_with_another_versions(tmp_path):
    run = make_run(tmp_path / "run", [2.0], config=False)
    assert figures(load_runs([run])[0])["Model"] == ""
    (run / "config.json").write_text('{"model": {"from_the_future": 1}, "train": {}}')
    assert figures(load_runs([run])[0])["Model"] == ""
    text, _ = report([run], tmp_path)
    assert "model.from_the_future" in text
