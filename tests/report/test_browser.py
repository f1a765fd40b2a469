"""The report in a browser, where there is one."""

import time

import pytest
from browser_case import CHROMIUM, Browser
from report_case import make_run

from jaxlm.report.curves import load_runs
from jaxlm.report.page import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


# What is to run in a second or later waits in `later`.
LATER = """
window.later = [];
const real = setTimeout;
window.setTimeout = (f, ms) => ms < 1000 ? real(f, ms) : later.push({f, ms});
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=LATER)
        yield browser


def test_nothing_is_wider_than_a_narrow_window(tmp_path, browser):
    name = "a-name-of-a-run-without-any-space-in-it-that-says-it-all"
    samples = [(20, "word " * 100), (1000, "w" * 300)]
    run = make_run(tmp_path / name, [3.0, 2.0], evals=[(20, 2.5)], samples=samples)
    other = make_run(tmp_path / "other", [3.0, 2.0], lr=2e-3)
    for runs in ([run], [run, other]):
        page = write_report(load_runs(runs), tmp_path / "report.html")
        for width in (1200, 420, 320):
            browser.resize(width, 900)
            browser.goto(page)
            browser.evaluate(
                "for (const d of document.querySelectorAll('details')) d.open = true"
            )
            # The scrollbar is as wide as the difference of the two widths.
            wide = browser.evaluate("document.documentElement.scrollWidth")
            assert wide == browser.evaluate("document.documentElement.clientWidth")


def test_the_curve_ends_at_the_figure_of_the_page(tmp_path, browser):
    losses = [3 + (-1) ** i * 0.1 - i / 100 for i in range(200)]
    page = write_report(
        load_runs([make_run(tmp_path / "run", losses)]), tmp_path / "report.html"
    )
    browser.goto(page)
    chart = "document.querySelector('figure.big svg')"
    end = f"{chart}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'End'}}))"
    browser.evaluate(end)
    tip = browser.evaluate("document.querySelector('figure.big .tip').innerText")
    shown = browser.evaluate("document.querySelector('.tiles dd').innerText")
    smoothed = float(tip.split("smoothed ")[1].split()[0])
    assert f"{smoothed:.4f}" == shown


def test_a_page_in_progress_reloads_and_keeps_what_was_chosen(tmp_path, browser):
    run = make_run(
        tmp_path / "run",
        [3.0, 2.0],
        evals=[(20, 2.5)],
        samples=[(10, "a"), (20, "b"), (30, "c\n" * 100)],
    )
    page = write_report(load_runs(run), tmp_path / "report.html", next_s=60.0)
    browser.resize(800, 500)
    browser.goto(page)
    live = "document.getElementById('live').textContent"
    assert "this page reloads itself" in browser.evaluate(live)
    browser.evaluate("""
        const click = (selector) => document.querySelector(selector).click();
        click("input[value=tokens]"); click("#log"); click("#legend button");
        click("summary");
        const slider = document.getElementById("sample-step");
        slider.value = 1; slider.dispatchEvent(new Event("input"));
        scrollTo(0, 321);
    """)
    write_report(load_runs(run), page, next_s=60.0)
    browser.evaluate("later.pop().f()")
    browser.wait_for_load()
    # The browser scrolls back after the load.
    browser.evaluate(
        "new Promise(done => { const look = () => scrollY ? done() : real(look, 20);"
        " look(); })"
    )
    chosen = browser.evaluate("""[
        document.querySelector("input[name=axis]:checked").value,
        document.getElementById("log").checked,
        document.querySelector("#legend button").getAttribute("aria-pressed"),
        document.querySelector("details").open,
        document.getElementById("sample-value").textContent, scrollY,
        document.querySelector("figure.big svg").textContent.includes("tokens seen"),
    ]""")
    assert chosen == ["tokens", True, "false", True, "20 (2 of 3)", 321, True]
    write_report(load_runs(run), page)  # the last one
    browser.evaluate("later.pop().f()")
    browser.wait_for_load()
    assert browser.evaluate(live) == ""
    assert browser.evaluate("later.length") == 0


def test_a_page_of_a_killed_run_stops_reloading(tmp_path, browser, monkeypatch):
    run, began = make_run(tmp_path / "run", [3.0, 2.0]), time.time()
    for age, said in ((3000, "reloads itself"), (4001, "nothing came since")):
        monkeypatch.setattr(time, "time", lambda age=age: began - age)
        browser.goto(
            write_report(load_runs(run), tmp_path / "report.html", next_s=100.0)
        )
        assert said in browser.evaluate("document.getElementById('live').textContent")
        # The first looks again after a quarter of its age, the other one never.
        waits = browser.evaluate("later.map(({ms}) => ms / 1000)")
        assert waits == ([pytest.approx(750, rel=0.3)] if age == 3000 else [])


def test_the_first_value_is_a_point_on_an_axis_of_whole_steps(tmp_path, browser):
    page = write_report(
        load_runs([make_run(tmp_path / "run", [3.0])]), tmp_path / "report.html"
    )
    browser.goto(page)
    svg = "document.querySelector('figure.big svg')"
    assert browser.evaluate(f"{svg}.querySelectorAll('circle.point').length") == 1
    labels = browser.evaluate(
        f"[...{svg}.querySelectorAll('text[text-anchor=middle]')]"
        ".map(x => x.textContent).join(' ')"
    )
    assert labels == "9 10 11 step"
