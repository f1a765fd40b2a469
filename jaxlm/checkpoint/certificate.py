"""Certificates: the findings of `jaxlm verify` beside a checkpoint, with its hash.

A certificate is a note for whoever works with the files, not a signature: anyone who
can change the files can change it too.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.native.integrity import MANIFEST
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.files.beginnings import CERTIFICATE
from jaxlm.files.durable import replacing
from jaxlm.terminal.progress import progress_bar

FORMAT = 1
NAME = "certificate.json"
# The certificates of the largest models take 2 MB.
MAX_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 22
_LONGEST_SUMMARY = 300


def certificate_file(path: Path) -> Path:
    """Returns the file of a checkpoint's certificate: in its folder, or beside it.

    It lies beside a file, and beside a step folder, whose manifest allows no new files.
    """
    beside = path.is_file() or (path / MANIFEST).is_file()
    return path.with_name(f"{path.name}.{NAME}") if beside else path / NAME


def fingerprint(checkpoint: Checkpoint) -> str:
    """Returns the SHA-256 (hex) over the names and bytes of a checkpoint's files.

    Raises:
      ValueError: if they cannot be read.
    """
    digest, done = hashlib.sha256(), 0
    try:
        files = checkpoint.files()
        sizes = [file.stat().st_size for file in files]
        with progress_bar(f"hashing {checkpoint.path}", sum(sizes)) as advance_to:
            for file, size in zip(files, sizes, strict=True):
                digest.update(f"{file.name} {size}\n".encode())
                with file.open("rb") as stream:
                    while chunk := stream.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        done += len(chunk)
                        advance_to(done)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    return digest.hexdigest()


def _dates(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Returns the size and modification time (ns) of each file.

    While these are unchanged, `read` assumes that the bytes are too: hashing takes as
    long as loading.
    """
    stats = {file.name: file.stat() for file in checkpoint.files()}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}


def write(
    checkpoint: Checkpoint, findings: dict[str, Any], target: Path | None = None
) -> Path:
    """Writes the findings about a checkpoint; returns the file.

    Args:
      findings: JSON values. `passed` and the line `summary` are required.
      target: the file; None means `certificate_file(checkpoint.path)`.

    Raises:
      OSError: if it cannot be written.
    """
    content = {
        "format": FORMAT,
        "fingerprint": fingerprint(checkpoint),
        "dates": _dates(checkpoint),
        **findings,
    }
    target = certificate_file(checkpoint.path) if target is None else target
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    # Puts lists of numbers on one line. Strings stay as they are: their line breaks
    # are escaped.
    text = re.sub(r"\[\n[\s\d,.eE+-]*\]", lambda m: " ".join(m[0].split()), text)
    with replacing(target, CERTIFICATE) as file:
        file.write((text + "\n").encode())
    return target


def read_file(file: Path) -> dict[str, Any]:
    """Reads a certificate, whatever checkpoint it belongs to.

    Raises:
      ValueError: if it is missing, broken or of another version.
    """
    kinds = {"fingerprint": str, "passed": bool, "summary": str}
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError
        content = json.loads(file.read_bytes())
        known = content["format"] == FORMAT
        if known and not (
            all(isinstance(content.get(k), kind) for k, kind in kinds.items())
            # It comes with other people's files, and is printed on a terminal.
            and content["summary"].isprintable()
            and len(content["summary"]) <= _LONGEST_SUMMARY
        ):
            raise ValueError
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ValueError(f"{file} is broken: delete it, and verify again") from None
    if not known:
        raise ValueError(f"{file} is of another version: verify again")
    return content


def read(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Reads the certificate of a checkpoint; None if it has none.

    Raises:
      ValueError: if the certificate is broken, or belongs to other bytes.
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
        raise ValueError(f"{file} belongs to other weights than these: verify again")
    return content


def summary(checkpoint: Checkpoint) -> str | None:
    """Sums up the certificate of a checkpoint in one line; None if it says nothing.

    It does if the verification failed, or there was an independent implementation.
    """
    try:
        content = read(checkpoint)
    except ValueError as error:
        return f"warning: {error}"
    if content is None or (content["passed"] and content.get("reference") is None):
        return None
    verdict = "verified" if content["passed"] else "FAILED verification"
    return f"{checkpoint.path}: {verdict} {content['summary']}".rstrip()
