"""What `jaxlm verify` found, written beside a checkpoint and bound to its bytes.

It is a note for the person who works with the files, not a signature: whoever can
change them can change it too.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.durable import replacing
from jaxlm.checkpoint.native.integrity import MANIFEST
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.progress import progress_bar

FORMAT = 1
NAME = "certificate.json"
# Those of the largest models have 2 MB.
MAX_BYTES = 64 << 20
_PART = 1 << 22
_LONGEST_SUMMARY = 300


def certificate_file(path: Path) -> Path:
    """The file of a checkpoint's certificate: in its folder, or beside it.

    Beside a file, and beside a step of a run: its manifest allows no other file in it.
    """
    beside = path.is_file() or (path / MANIFEST).is_file()
    return path.with_name(f"{path.name}.{NAME}") if beside else path / NAME


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 (hex) over the names and bytes of the files of a checkpoint.

    Raises:
      ValueError: when they cannot be read.
    """
    digest, done = hashlib.sha256(), 0
    try:
        files = checkpoint.files()
        sizes = [file.stat().st_size for file in files]
        with progress_bar(f"hashing {checkpoint.path}", sum(sizes)) as advance_to:
            for file, size in zip(files, sizes, strict=True):
                digest.update(f"{file.name} {size}\n".encode())
                with file.open("rb") as stream:
                    while part := stream.read(_PART):
                        digest.update(part)
                        done += len(part)
                        advance_to(done)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    return digest.hexdigest()


def _dates(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and time of change (ns) of each file.

    While these are unchanged, `read` assumes that the bytes are: hashing takes as
    long as loading.
    """
    stats = {file.name: file.stat() for file in checkpoint.files()}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}


def write(
    checkpoint: Checkpoint, findings: dict[str, Any], target: Path | None = None
) -> Path:
    """Writes the findings about a checkpoint; returns the file.

    Args:
      findings: JSON values; `passed` and `summary`, one line, are what `summary` shows.
      target: another file than `certificate_file(checkpoint.path)`.

    Raises:
      OSError: when it cannot be written.
    """
    content = {
        "format": FORMAT,
        "fingerprint": fingerprint(checkpoint),
        "dates": _dates(checkpoint),
        **findings,
    }
    target = certificate_file(checkpoint.path) if target is None else target
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    # Thousands of numbers, each on a line of its own, would hide all else. No text is
    # touched: a line break in a text is escaped.
    text = re.sub(r"\[\n[\s\d,.eE+-]*\]", lambda m: " ".join(m[0].split()), text)
    with replacing(target) as file:
        file.write((text + "\n").encode())
    return target


def read_file(file: Path) -> dict[str, Any]:
    """The content of a certificate, whatever checkpoint it belongs to.

    Raises:
      ValueError: when it is missing, broken or of another version.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError
        content = json.loads(file.read_bytes())
        known = content["format"] == FORMAT
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ValueError(f"{file} is broken: delete it, or verify again") from None
    if not known:
        raise ValueError(f"{file} is of another version: verify again")
    kinds = {"fingerprint": str, "passed": bool, "summary": str}
    if not all(isinstance(content.get(k), kind) for k, kind in kinds.items()):
        raise ValueError(f"{file} is broken: delete it, or verify again")
    # It comes with other people's files, and is shown on a terminal.
    if not content["summary"].isprintable() or (
        len(content["summary"]) > _LONGEST_SUMMARY
    ):
        raise ValueError(f"{file} is broken: delete it, or verify again")
    return content


def read(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The findings about a checkpoint; None where there are none.

    Raises:
      ValueError: when the certificate is broken, or belongs to other bytes.
    """
    file = certificate_file(checkpoint.path)
    if not file.is_file():
        return None
    content = read_file(file)
    try:
        unchanged = content.get("dates") == _dates(checkpoint)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    if not unchanged and content["fingerprint"] != fingerprint(checkpoint):
        raise ValueError(
            f"{file} belongs to other weights than those that are there: verify again"
        )
    return content


def summary(checkpoint: Checkpoint) -> str | None:
    """One line about the certificate of a checkpoint; None where there is none."""
    try:
        content = read(checkpoint)
    except ValueError as error:
        return f"warning: {error}"
    if content is None:
        return None
    verdict = "verified" if content["passed"] else "FAILED verification"
    return f"{checkpoint.path}: {verdict} {content['summary']}".rstrip()
