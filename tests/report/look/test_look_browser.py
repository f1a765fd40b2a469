"""The page of a view in a browser, where there is one."""

from dataclasses import replace

import numpy as np
import pytest
from browser_case import CHROMIUM, Browser
from look_case import CONFIG, OTHER, TOKENIZER, view

from jaxlm.config import SampleConfig
from jaxlm.infer.sampling_steps import sampling_steps
from jaxlm.report.look.look_page import MAX_BYTES, write_page
from jaxlm.report.look.view import ExpertView

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


def visible(text):
    """As the page writes a piece: each blank as a sign, or by its number."""
    signs = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    hidden = [c if c.isprintable() else f"U+{ord(c):04X}" for c in text]
    return "".join(signs.get(c, h) for c, h in zip(text, hidden, strict=True))


def test_every_control_works_without_a_network(browser, page):
    opened(browser, page)
    assert browser.evaluate("document.querySelectorAll('section').length") == 11
    assert browser.evaluate("document.title") == "Inside </script><b>"
    assert browser.evaluate(PRESS_ALL) > 15
    assert browser.evaluate("document.querySelectorAll('details[open] td').length") > 90
    assert browser.problems == []


def test_nothing_is_wider_than_the_window(browser, page):
    opened(browser, page)
    for width in (1200, 420, 320):
        browser.resize(width, 900)
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
        assert piece == visible(seen.pieces[int(answer.ids[t, k])])
        assert float(probability.removesuffix("\u00a0%")) == pytest.approx(
            100 * answer.probabilities[t, k], rel=0.06
        )
        assert float(logit.replace("−", "-")) == pytest.approx(
            answer.logits[t, k], rel=1e-3
        )
    # The chosen head's row: score, probability, length of the value, their product.
    layer, head = browser.evaluate(
        "document.querySelector('#attention h3').textContent.match(/\\d+/g).slice(0, 2).map(Number)"
    )
    cause = seen.causes
    assert [layer, head] == cause.ablated[abs(cause.ablation).argmax()].tolist()
    i = seen.heads.heads.tolist().index([layer, head])
    pairs = seen.heads.probabilities[i].astype(float)
    for s, (_, score, probability, length, brings, signed) in enumerate(
        cells(browser, "attention")[1:]
    ):
        p, v = pairs[t * (t + 1) // 2 + s], seen.heads.value_lengths[i, s]
        assert float(probability.removesuffix("\u00a0%")) == pytest.approx(
            100 * p, rel=0.06, abs=1e-3
        )
        assert float(length) == pytest.approx(v, rel=1e-3)
        assert figure(signed) == pytest.approx(
            float(cause.keys[layer, head, s]), rel=2e-3, abs=1e-6
        )
        assert float(brings) == pytest.approx(p * v, rel=2e-3, abs=1e-3)
        if score != "–":
            expected = np.log(p) + seen.heads.lse[i, t]
            assert float(score.replace("−", "-")) == pytest.approx(
                expected, rel=2e-3, abs=2e-3
            )

    # The sentence on the first token of the chosen layer.
    said = browser.evaluate(
        "[...document.querySelectorAll('#cache p')].at(-1).textContent"
        ".match(/[\\d.]+(?=[,\u00a0 ]|\\.$)/g).map(Number)"
    )
    keys, values = (
        lengths[layer].astype(float).mean(1)
        for lengths in (seen.cache.key_lengths, seen.cache.value_lengths)
    )
    others = [keys[0], keys[1:].mean(), values[0], values[1:].mean()]
    expected = [layer, 100 * seen.cache.read[layer, 0], *others]
    assert said == pytest.approx(expected, rel=6e-3)


def figure(text):
    return float(text.removesuffix("\u00a0%").replace("−", "-").split(":")[0])


def test_tables_have_the_numbers_of_the_view(browser, page, seen):
    """Of the sections whose pictures draw the same numbers."""
    opened(browser, page)
    t, L, cause, units = seen.position, 2, seen.causes, seen.units
    close = dict(rtol=2e-3, atol=1e-6)
    streams = cells(browser, "streams", 0)[1:]
    entropies = [figure(row[2]) for row in streams]
    np.testing.assert_allclose(entropies, seen.jacobian.entropy[:, t], atol=6e-3)
    assert [int(row[3]) for row in streams] == seen.jacobian.answer_rank[:, t].tolist()
    lengths = [figure(row[4]) for row in streams]
    np.testing.assert_allclose(lengths, seen.jacobian.lengths[:, t], **close)
    at = units.positions.tolist().index(t)
    found = [[figure(x) for x in row[1:3]] for row in cells(browser, "memory", 1)[1:]]
    wanted = np.stack([units.parts[at], units.activations[at][:, t]], axis=1)
    np.testing.assert_allclose(found, wanted, **close)
    adding, added = cells(browser, "adding", 0)[1:], seen.additions
    names = "attention_divisor attention_input attention feed_forward_divisor "
    for column, name in enumerate((names + "feed_forward_input feed_forward").split()):
        found = [figure(row[2 + column]) for row in adding]
        np.testing.assert_allclose(found, getattr(added, name)[:, t], **close)
    parts = {row[0]: figure(row[1]) for row in cells(browser, "causes", 0)[1:]}
    wanted = {f"attn {i}": cause.parts[i, 0] for i in range(L)}
    wanted |= {f"ffn {i}": cause.parts[i, 1] for i in range(L)}
    assert parts == pytest.approx(
        {"embedding": cause.total["embedding"], **wanted}, rel=2e-3
    )
    lost = cells(browser, "causes", 1)[1:]
    order = np.argsort(-abs(cause.ablation))[:6]
    assert [row[0] for row in lost] == [
        "{} · {}".format(*cause.ablated[i]) for i in order
    ]
    for row, i in zip(lost, order, strict=True):
        share, rest = (
            cause.heads[*cause.ablated[i]],
            cause.difference - cause.ablation[i],
        )
        found = [figure(x) for x in row[1:]]
        assert found == pytest.approx([cause.ablation[i], share, rest], rel=2e-3)
    other = [figure(row[1]) for row in cells(browser, "causes", 2)[1:]]
    np.testing.assert_allclose(
        other, 100 * seen.comparison.probabilities, rtol=0.06, atol=1e-3
    )

    # Experts are drawn beside the units, and both lenses.
    head, *rows = cells(browser, "memory", 0)
    layer = int(seen.causes.ablated[abs(seen.causes.ablation).argmax(), 0])
    assert head[:2] == [f"expert of layer {layer}", "9 tokens × 2"]
    times = np.bincount(seen.experts.ids[layer].reshape(-1))
    order = np.argsort(-times, kind="stable")
    assert [row[:2] for row in rows] == [[str(e), str(times[e])] for e in order]
    names = browser.evaluate(
        "[...document.querySelectorAll('#streams label')].map(x => x.textContent.trim())"
    )
    assert names[:2] == ["Jacobian lens", "logit lens"]


SETTINGS = (
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1.5, "top_k": 0, "top_p": 0.5, "min_p": 0.0},
    {"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1},
)


def test_the_sliders_choose_as_generation_does(browser, page, seen):
    opened(browser, page)
    for settings in SETTINGS:
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
            assert float(removed.removesuffix("\u00a0%")) == pytest.approx(
                100 * step.removed, abs=0.051
            )
        last = steps[-1].probabilities
        for k, (_, _, drawn, _) in enumerate(cells(browser, "choosing")[1:6]):
            p = last[seen.answer.ids[seen.position, k]]
            if drawn == "removed":
                assert p == 0
            else:
                assert float(drawn.removesuffix("\u00a0%")) == pytest.approx(
                    100 * p, rel=0.06
                )
