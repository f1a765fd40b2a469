"""The page of `jaxlm look`: one HTML file that opens from disk, without a network."""

import html
from importlib import resources
from pathlib import Path
from typing import Any

from jaxlm.files.beginnings import PAGE
from jaxlm.files.durable import replacing
from jaxlm.report.look.packed_arrays import packed
from jaxlm.report.page import asset, fill, script_json

MAX_BYTES = 5_000_000
"""Of a page. What does not fit was left out of the `View`, which says so."""


def write_page(view: Any, out: Path | str) -> Path:
    """Writes the page of a view, and returns its path.

    Args:
      view: a `View`. Its file imports this one.
      out: the file.

    Raises:
      OSError: if `out` cannot be written; a file that was there is left as it was.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, PAGE) as file:
        file.write(page_text(view).encode())
    return out


def page_text(view: Any) -> str:
    """Returns the page of a view."""
    json, arrays = packed(view)
    text = fill(
        _own("look_page.html"),
        {
            "title": html.escape(f"Inside {json['title']}"),
            "style": asset("page.css") + _own("look_page.css"),
            "script": asset("drawing.js") + _own("widgets.js") + _own("sections.js"),
            "data": script_json(json),
            "arrays": arrays,
        },
    )
    assert len(text.encode()) <= MAX_BYTES, len(text)
    return text


def notebook_frame(view: Any, height: int = 800) -> str:
    """Returns the page in a frame, as a notebook shows it."""
    text = html.escape(page_text(view))
    return (
        f'<iframe srcdoc="{text}" sandbox="allow-scripts allow-downloads" '
        f'style="width:100%;height:{height}px;border:0"></iframe>'
    )


def _own(name: str) -> str:
    folder = resources.files("jaxlm.report.look")
    return folder.joinpath(name).read_text(encoding="utf-8")
