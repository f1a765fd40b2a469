"""How the files begin that jaxlm writes and may replace; nothing else is replaced."""

from pathlib import Path

PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src """
CERTIFICATE = b'{\n "format": '
# A PNG of 1200 x 750 pixels.
PICTURE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes.fromhex("000004b0000002ee")


def begins(path: Path, beginning: bytes) -> bool:
    """Whether a file begins so, is empty, or is not there."""
    if not path.is_file():
        return True
    with path.open("rb") as file:
        return file.read(len(beginning)) in (b"", beginning)
