"""The page of a view in a browser, where there is one."""

from dataclasses import replace

import numpy as np
import pytest
from browser_case import CHROMIUM, Browser
from inside_case import CONFIG, OTHER, TOKENIZER, view

from jaxlm.config import SampleConfig
from jaxlm.infer.sampling_steps import sampling_steps
from jaxlm.report.inside.inside_page import MAX_BYTES, write_page
from jaxlm.report.inside.view import ExpertView

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
# Everything that a person can press or move, pressed and moved.
PRESS_ALL = """
for (const one of document.querySelectorAll("#strip button, [role=button], section input[type=radio], summary, section button"))
  one.dispatchEvent(new MouseEvent("click", {bubbles: true}));
for (const one of document.querySelectorAll("section input[type=range]")) {
  one.value = one.min; one.dispatchEvent(new Event("input"));
  one.value = one.max; one.dispatchEvent(new Event("input"));
}
for (let i = 0; i < document.querySelectorAll("canvas, figure > svg").length; i++) {
  const one = document.querySelectorAll("canvas, figure > svg")[i], box = one.getBoundingClientRect();
  const at = {bubbles: true, clientX: box.left + 0.7 * box.width, clientY: box.top + 0.7 * box.height};
  one.dispatchEvent(new PointerEvent("pointermove", at));
  for (const key of ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Enter", "Escape"])
    one.dispatchEvent(new KeyboardEvent("keydown", {bubbles: true, key}));
  const again = document.querySelectorAll("canvas, figure > svg")[i];
  again.dispatchEvent(new MouseEvent("click", at));
}
for (const key of ["Home", "ArrowRight", "End", "ArrowLeft"])
  document.getElementById("strip").dispatchEvent(new KeyboardEvent("keydown", {bubbles: true, key}));
document.querySelectorAll("details").length
"""


@pytest.fixture(scope="module")
def seen():
    sample = SampleConfig(temperature=0.7, top_k=40, top_p=0.8, min_p=0.02)
    shape = CONFIG.num_layers, CONFIG.model_dim, CONFIG.model_dim
    jacobian = np.broadcast_to(np.eye(CONFIG.model_dim, dtype=np.float32), shape)
    seen = view(against=TOKENIZER.encode(OTHER), sample=sample, jacobian=jacobian)
    # Experts are drawn beside the units, which such a model would not have.
    ids = np.arange(CONFIG.num_layers * 9 * 2, dtype=np.int32).reshape(-1, 9, 2) % 4
    experts = ExpertView(ids, np.full(ids.shape, 0.5, np.float32))
    return replace(seen, experts=experts, model={**seen.model, "num_experts": 4})


@pytest.fixture(scope="module")
def page(seen, tmp_path_factory):
    path = write_page(seen, tmp_path_factory.mktemp("page") / "new" / "inside.html")
    assert path.stat().st_size < min(MAX_BYTES, 300_000)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def opened(browser, page, width=1200):
    browser.problems.clear()
    browser.resize(width, 900)
    browser.goto(page)
    browser.evaluate(
        "new Promise(done => { const look = () => document.body.dataset.ready"
        " ? done(1) : setTimeout(look, 20); look(); })"
    )


def cells(browser, section, table=0):
    """The text of a table, row by row."""
    return browser.evaluate(
        f"[...document.querySelectorAll('#{section} table')[{table}].rows]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )


def test_every_control_works_without_a_network(browser, page):
    opened(browser, page)
    assert browser.evaluate("document.querySelectorAll('section').length") == 11
    assert browser.evaluate("document.title") == "Inside </script><b>"
    assert browser.evaluate(PRESS_ALL) > 15
    assert browser.evaluate("document.querySelectorAll('details[open] td').length") > 90
    assert browser.problems == []


def test_nothing_is_wider_than_the_window(browser, page):
    for width in (1200, 420, 320):
        opened(browser, page, width)
        browser.evaluate(
            "for (const d of document.querySelectorAll('details')) d.open = true; new Promise(done => setTimeout(done, 50))"
        )
        wide = browser.evaluate("document.documentElement.scrollWidth")
        assert wide == browser.evaluate("document.documentElement.clientWidth"), width


def test_numbers_are_those_of_the_view(browser, page, seen):
    opened(browser, page)
    t, answer = seen.position, seen.answer
    head, *rows = cells(browser, "answer")
    assert head[0] == f"after {t} /"
    for k, (piece, probability, logit, _) in enumerate(rows[:-1]):
        assert seen.pieces[int(answer.ids[t, k])].replace(" ", "␣") in (
            piece,
            "\n",
            "\t",
            "\r",
        )
        assert float(probability.removesuffix(" %")) == pytest.approx(
            100 * answer.probabilities[t, k], rel=0.06
        )
        assert float(logit.replace("−", "-")) == pytest.approx(
            answer.logits[t, k], rel=1e-3
        )
    # The chosen head's row: score, probability, length of the value, their product.
    layer, head = browser.evaluate(
        "document.querySelector('#attention h3').textContent.match(/\\d+/g).slice(0, 2).map(Number)"
    )
    i = seen.heads.heads.tolist().index([layer, head])
    pairs = seen.heads.probabilities[i].astype(float)
    for s, (_, score, probability, length, brings) in enumerate(
        cells(browser, "attention")[1:]
    ):
        p, v = pairs[t * (t + 1) // 2 + s], seen.heads.value_lengths[i, s]
        assert float(probability.removesuffix(" %")) == pytest.approx(
            100 * p, rel=0.06, abs=1e-3
        )
        assert float(length) == pytest.approx(v, rel=1e-3)
        assert float(brings) == pytest.approx(p * v, rel=2e-3, abs=1e-3)
        if score != "–":
            expected = np.log(p) + seen.heads.lse[i, t]
            assert float(score.replace("−", "-")) == pytest.approx(
                expected, rel=2e-3, abs=2e-3
            )


def test_experts_and_both_lenses_are_drawn(browser, page):
    opened(browser, page)
    head, *rows = cells(browser, "memory", 0)
    assert head[:2] == ["expert of layer 1", "9 tokens × 2"]
    assert [row[:2] for row in rows] == [["2", "5"], ["3", "5"], ["0", "4"], ["1", "4"]]
    names = browser.evaluate(
        "[...document.querySelectorAll('#streams label')].map(x => x.textContent.trim())"
    )
    assert names[:2] == ["Jacobian lens", "logit lens"]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.5, "min_p": 0.0},
        {"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1},
    ],
)
def test_the_sliders_choose_as_generation_does(browser, page, seen, settings):
    opened(browser, page)
    for i, value in enumerate(settings.values()):
        browser.evaluate(
            f"{{ const one = document.querySelectorAll('#choosing input')[{i}];"
            f" one.value = {value}; one.dispatchEvent(new Event('input')); }}"
        )
    steps = sampling_steps(seen.choice.logits[0], SampleConfig(**settings))
    rows = cells(browser, "choosing", 1)[2:]
    # The temperature alone removes nothing, and has no row.
    wanted = [s for s in steps[1:] if s.rule != "temperature" or len(steps) == 2]
    assert len(rows) == len(wanted)
    for (_, kept, removed), step in zip(rows, wanted, strict=True):
        assert int(kept) == step.kept.sum()
        assert float(removed.removesuffix(" %")) == pytest.approx(
            100 * step.removed, abs=0.051
        )
    last = steps[-1].probabilities
    for k, (_, _, drawn, _) in enumerate(cells(browser, "choosing")[1:6]):
        p = last[seen.answer.ids[seen.position, k]]
        if drawn == "removed":
            assert p == 0
        else:
            assert float(drawn.removesuffix(" %")) == pytest.approx(100 * p, rel=0.06)
