"""The report, the picture, and the curves in them."""

import html.parser
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from jaxlm.config import Config, ModelConfig, OptimizerConfig, TrainConfig, to_dict
from jaxlm.report import picture
from jaxlm.report.curves import downsample, figures, load_runs, smooth, stretch_means
from jaxlm.report.page import MAX_POINTS, MAX_SAMPLES, write_report
from jaxlm.report.picture import draw_loss_png
from jaxlm.train.metrics import MetricsWriter

HOSTILE = (
    "</script><script>alert(1)</script><!-- {{data}} & <img src=x onerror=alert(2)>"
)


def make_run(
    folder, losses, *, evals=(), samples=(), log_every=10, config=True, **more
):
    """A run folder whose training rows have `losses`."""
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        model = ModelConfig(
            vocab_size=65,
            num_layers=2,
            model_dim=32,
            num_heads=4,
            num_kv_heads=4,
            head_dim=8,
            hidden_dim=64,
            context_length=256,
        )
        optimizer = OptimizerConfig(learning_rate=more.pop("lr", 1e-3), warmup_steps=0)
        train = TrainConfig(steps=2000)
        config = to_dict(Config(model=model, optimizer=optimizer, train=train))
        (folder / "config.json").write_text(json.dumps(config))
    with MetricsWriter(folder) as writer:
        for i, loss in enumerate(losses, start=1):
            step = i * log_every
            writer.write(
                "train",
                step,
                loss=loss,
                lr=1e-3,
                grad_norm=0.5,
                tokens_per_s=1000.0,
                mfu=0.25,
                data_wait_s=0.01,
                step_s=0.1,
                tokens=step * 256,
                wall_s=step * 0.1,
            )
        for step, loss in evals:
            writer.write("eval", step, loss=loss, bits_per_byte=loss / 2, targets=9)
        for step, text in samples:
            writer.write("sample", step, text=text, prompt="> ")
    return folder


class Page(html.parser.HTMLParser):
    """What a browser would find in a page: elements, attributes and data."""

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
    text = write_report(runs, tmp_path / "out" / "report.html").read_text("utf-8")
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
    # Of the config only what differs is marked.
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


def test_hostile_text_is_inert(tmp_path):
    name = "<b onclick=x>&'\"{{script}}"
    run = make_run(
        tmp_path / name, [2.0], samples=[(10, HOSTILE), (20, "\u2028\ud800")]
    )
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"] = [HOSTILE]
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
    with Image.open(draw_loss_png(run, tmp_path / "loss.png")) as image:
        assert image.size == (1200, 750)


def test_long_runs_are_thinned_and_keep_their_spikes(tmp_path):
    losses = 2 + np.random.default_rng(0).normal(size=5000) * 0.1
    losses[1234], losses[4321], losses[777] = 50.0, -50.0, math.nan
    run = make_run(
        tmp_path / "run",
        losses,
        log_every=1,
        samples=[(i, str(i)) for i in range(2 * MAX_SAMPLES)],
    )
    _, page = report([run], tmp_path)
    data = page.data["runs"][0]
    curve = data["curves"]["train"]
    assert len(curve["y"]) <= MAX_POINTS
    assert curve["y"][curve["step"].index(1235)] == 50.0
    assert curve["y"][curve["step"].index(4322)] == -50.0
    assert curve["y"][curve["step"].index(778)] is None
    assert len(curve["mean"]["y"]) <= MAX_POINTS
    assert len(data["samples"]) == MAX_SAMPLES == data["omitted"]
    assert [data["samples"][i]["step"] for i in (0, -1)] == [0, 2 * MAX_SAMPLES - 1]


@pytest.mark.parametrize("n", [0, 1, 20, 21, 1000, 100_000])
def test_downsampling_keeps_extremes_and_ends(n):
    values = np.random.default_rng(n).normal(size=n)
    kept = downsample(values, 20)
    assert len(kept) <= 20 and (np.diff(kept) > 0).all()
    if n:
        assert kept[0] == 0 and kept[-1] == n - 1
        assert values.argmin() in kept and values.argmax() in kept


def test_means_of_stretches_ignore_non_finite_values():
    middles, means = stretch_means(
        np.array([1.0, 3.0, math.nan, 5.0, math.inf, 7.0]), 3
    )
    assert middles.tolist() == [0, 2, 4] and means.tolist() == [2.0, 5.0, 7.0]


def test_smoothing_keeps_lines_and_gaps():
    line = np.linspace(4.0, 1.0, 101)
    # Symmetric windows leave a straight line as it is, but where the end cuts them.
    np.testing.assert_allclose(smooth(line, 5)[:90], line[:90], rtol=1e-12)
    noisy = line + np.random.default_rng(0).normal(size=101) * 0.1
    noisy[50] = math.nan
    flat = smooth(noisy, 5)
    assert math.isnan(flat[50]) and np.isfinite(np.delete(flat, 50)).all()
    assert np.nanstd(flat - line) < 0.5 * np.nanstd(noisy - line)


def pixel(image, x, y):
    """Colours in the 5 x 5 pixels around a place."""
    x, y = round(x), round(y)
    return np.asarray(image.convert("RGB"))[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)


def has_colour(image, x, y, colour):
    distance = np.abs(pixel(image, x, y).astype(int) - np.array(colour)).max(axis=1)
    return distance.min() < 40


def test_the_picture_shows_the_curve_where_it_belongs(tmp_path):
    losses = np.linspace(3.98, 2.0, 100)  # at steps 10, 20 .. 1000
    run = make_run(tmp_path / "run", losses, evals=[(500, 3.5), (1000, 3.0)])
    with Image.open(draw_loss_png(run, tmp_path / "loss.png")) as image:
        assert image.format == "PNG" and image.size == (1200, 750)
        image = image.convert("RGB")
    margin = 0.04 * 1.98
    low, high = 2.0 - margin, 3.98 + margin

    def place(step, loss):
        x = picture.LEFT + step / 1000 * (picture.RIGHT - picture.LEFT)
        share = (loss - low) / (high - low)
        return x, picture.BOTTOM - share * (picture.BOTTOM - picture.TOP)

    blue, orange = picture.COLOURS[0], picture.COLOURS[1]
    for step in (100, 250, 700, 900):
        x, y = place(step, losses[step // 10 - 1])
        assert has_colour(image, x, y, blue)
        assert not has_colour(image, x, y - 40, blue)
        assert not has_colour(image, x, y + 40, blue)
    assert has_colour(image, *place(750, 3.25), orange)
    assert not has_colour(image, *place(250, 3.5), orange)  # nothing before the first


def test_the_picture_of_several_runs_has_a_colour_for_each(tmp_path):
    runs = [make_run(tmp_path / str(i), [3.0 + i, 2.0 + i] * 20) for i in range(3)]
    with Image.open(draw_loss_png(runs, tmp_path / "loss.png")) as image:
        colours = {c for _, c in image.convert("RGB").getcolors(1 << 20)}
    assert set(picture.COLOURS[:3]) <= colours
    assert picture.COLOURS[3] not in colours


def test_a_wide_span_of_losses_is_drawn_on_a_log_scale(tmp_path):
    assert picture._frame(load_runs([make_run(tmp_path / "a", [900.0, 2.0])])).log
    assert not picture._frame(load_runs([make_run(tmp_path / "b", [4.0, 2.0])])).log


def test_equal_names_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / part / "run", [2.0]) for part in ("x", "y")]
    assert [run.name for run in load_runs(runs)] == ["x/run", "y/run"]
    assert [run.name for run in load_runs([runs[0], runs[0]])] == ["run", "run"]


def test_figures_without_config_or_with_another_versions(tmp_path):
    run = make_run(tmp_path / "run", [2.0], config=False)
    assert figures(load_runs([run])[0])["Model"] == ""
    (run / "config.json").write_text('{"model": {"from_the_future": 1}, "train": {}}')
    assert figures(load_runs([run])[0])["Model"] == ""
    text, _ = report([run], tmp_path)
    assert "model.from_the_future" in text


@pytest.mark.parametrize("make", [write_report, draw_loss_png])
def test_errors(tmp_path, make):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no run folder was given"):
        make([], out)
    with pytest.raises(ValueError, match=r"gone/metrics\.jsonl: no such file"):
        make([tmp_path / "gone"], out)
    run = make_run(tmp_path / "run", [2.0, 2.0])
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        make([run], out)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "rubbish", lines[1], ""]))
    (run / "config.json").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        make([run], out)
    assert not out.exists()
