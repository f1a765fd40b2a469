"""The page as text: its size, and what it may load."""

import re
from importlib import resources


def test_the_drawing_is_small_and_nothing_is_loaded():
    report = resources.files("jaxlm.report")
    scripts = [report / "drawing.js", *(report / "look").glob("*.js")]
    assert len(scripts) == 3
    assert sum(len(script.read_bytes()) for script in scripts) <= 60_000
    template = (report / "look" / "look_page.html").read_text()
    assert "default-src 'none'" in template
    text = template + "".join(script.read_text() for script in scripts)
    assert not re.search(r"https?://|innerHTML|\bfetch\(|\bsrc=", text)
