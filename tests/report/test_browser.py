"""The report in a browser, where there is one."""

import pytest
from browser_case import CHROMIUM, Browser
from report_case import make_run

from jaxlm.report.page import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_nothing_is_wider_than_a_narrow_window(tmp_path, browser):
    name = "a-name-of-a-run-without-any-space-in-it-that-says-it-all"
    samples = [(20, "word " * 100), (1000, "w" * 300)]
    run = make_run(tmp_path / name, [3.0, 2.0], evals=[(20, 2.5)], samples=samples)
    other = make_run(tmp_path / "other", [3.0, 2.0], lr=2e-3)
    for runs in ([run], [run, other]):
        page = write_report(runs, tmp_path / "report.html")
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
    page = write_report([make_run(tmp_path / "run", losses)], tmp_path / "report.html")
    browser.goto(page)
    chart = "document.querySelector('figure.big svg')"
    end = f"{chart}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'End'}}))"
    browser.evaluate(end)
    tip = browser.evaluate("document.querySelector('figure.big .tip').innerText")
    shown = browser.evaluate("document.querySelector('.tiles dd').innerText")
    smoothed = float(tip.split("smoothed ")[1].split()[0])
    assert f"{smoothed:.4f}" == shown
