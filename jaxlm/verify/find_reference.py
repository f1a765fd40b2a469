"""Finds what to compare a model with: transformers if installed, else a certificate."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxlm import tree
from jaxlm.checkpoint import certificate
from jaxlm.checkpoint.hf.hf_folder import write_hf
from jaxlm.checkpoint.load import HUB_FILES
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.config import ModelConfig
from jaxlm.files.hub import HUB, download
from jaxlm.terminal.printable import shown
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.hugging_face.tokenizer_export import write_hugging_face
from jaxlm.types import Params
from jaxlm.verify import peer
from jaxlm.verify.comparing import NUM_GREEDY, steady_length
from jaxlm.verify.expected import Expected, TextIds, from_json, observe
from jaxlm.verify.hard_texts import HARD_TEXTS

# Number of tokens of the prompt for the greedy continuation.
_PROMPT = 32


@dataclass(frozen=True, eq=False)
class Subject:
    """The model to verify."""

    checkpoint: Checkpoint
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    tokens: Int32[np.ndarray, "T"]
    """The text to compare on."""


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference to compare with."""

    expected: Expected | None
    """Its values; None if there is no independent implementation."""
    about: str
    """A description, or why there is no reference, as text."""


def find_reference(
    subject: Subject, against: str | Path | None, report: Callable[[str], None]
) -> Reference:
    """Finds the requested reference, or the best one available.

    Without `against`, the best is transformers, which reads the same files if it can,
    and otherwise an export of jaxlm. Without transformers, it is the certificate beside
    the model.

    Args:
      against: a Hugging Face folder, hf:owner/name, a .gguf file, a certificate
        (.json), or None.
      report: gets a line before each long step.

    Raises:
      ValueError: if the requested reference cannot be used.
    """
    if against is not None:
        against = str(against)
        if against.startswith(HUB):
            against = str(download(against.removeprefix(HUB), HUB_FILES))
        path = Path(os.path.expanduser(against))
        if path.suffix == ".json":
            return _stored(subject, path)
        if not path.exists():
            raise ValueError(f"--against {path}: no such folder or file")
        return _live(subject, path, f"read {shown(str(path))} itself", report)
    if not peer.installed(*peer.NEEDED):
        return _beside(subject, report)
    path, kind = subject.checkpoint.path, subject.checkpoint.kind
    note = ""
    try:
        if kind == "hf":
            return _live(subject, path, "read the same files itself", report)
        if kind == "gguf" and peer.installed(*peer.NEEDED_FOR_GGUF):
            try:
                return _live(subject, path, "read the same file itself", report)
            except ValueError as error:
                note = f" ({error})"
        elif kind == "gguf":
            wanted = " ".join(peer.NEEDED_FOR_GGUF)
            note = f" (to read the file itself, it needs: pip install {wanted})"
        found = _exported(subject, report)
        return Reference(found.expected, found.about + note)
    except ValueError as error:
        return Reference(None, f"no independent implementation: {error}")


def _live(
    subject: Subject, path: Path, how: str, report: Callable[[str], None]
) -> Reference:
    """Runs transformers on files that it reads itself."""
    report(f"loading {path} with transformers")
    return _observed(subject, path, how, report)


def _exported(subject: Subject, report: Callable[[str], None]) -> Reference:
    """Runs transformers on an export of jaxlm."""
    how = "read what jaxlm wrote for it: it computes, but does not read, independently"
    needed = 4 * tree.count(subject.params)
    with tempfile.TemporaryDirectory(prefix="jaxlm-verify-") as name:
        free = shutil.disk_usage(name).free
        if needed > free:
            raise ValueError(
                f"the export for transformers takes {needed / 1e9:.1f} GB, and "
                f"{Path(name).parent} has {free / 1e9:.1f} GB: set TMPDIR to a folder "
                "with more"
            )
        folder = Path(name) / "model"
        report("writing the parameters for transformers")
        write_hf(folder, subject.config, subject.params, None)
        report("loading them with transformers")
        return _observed(subject, folder, how, report)


def _texts(subject: Subject, path: Path) -> dict[str, Any]:
    """Encodes the hard texts with the tokenizer of a folder, or with an export of ours.

    transformers can also convert the tokenizer of a GGUF file, but ignores how the file
    splits text; so it gets an export.

    Returns:
      Fields of `Expected`; only `texts_how`, with the reason, if there are no results.
    """
    if subject.tokenizer is None:
        return {"texts_how": "there is no tokenizer"}
    try:
        if any((path / name).is_file() for name in peer.TOKENIZER_FILES):
            return _read_texts(path, "read the same files itself")
        with tempfile.TemporaryDirectory(prefix="jaxlm-verify-") as name:
            write_hugging_face(subject.tokenizer, name)
            return _read_texts(Path(name), "read what jaxlm wrote for it")
    except ValueError as error:
        return {"texts_how": shown(str(error))}


def _read_texts(folder: Path, how: str) -> dict[str, Any]:
    tokenizer = peer.TransformersTokenizer(folder)
    found = ((text, tokenizer.encode(text)) for text in HARD_TEXTS)
    texts = tuple(
        TextIds(text, tuple(ids), tokenizer.decode(ids))
        for text, ids in found
        if ids is not None
    )
    return {"texts": texts, "first_ids": tokenizer.first_ids(), "texts_how": how}


def _observed(
    subject: Subject, path: Path, how: str, report: Callable[[str], None]
) -> Reference:
    """Runs transformers on the files at `path`."""
    engine = peer.TransformersModel(path)
    texts = _texts(subject, path)
    config, tokens = subject.config, subject.tokens
    # Within the length up to which rotations do not change.
    length = min(config.context_length, steady_length(config))
    new = min(NUM_GREEDY, length // 2)
    prompt = max(1, min(_PROMPT, len(tokens), length - new))
    report(f"{engine.name}: {len(tokens)} tokens, then {new} greedy ones")
    expected = observe(
        engine, tokens, prompt, new, how=how, versions=peer.versions(), **texts
    )
    _check_sizes(expected, config, engine.name)
    return Reference(expected, f"{expected.name}, which {how}")


def _beside(subject: Subject, report: Callable[[str], None]) -> Reference:
    """Reads the certificate beside the model, if it matches and has a reference."""
    checkpoint = subject.checkpoint
    missing = (
        "no independent implementation: torch and transformers are not installed (pip "
        "install 'jaxlm[parity]')"
    )
    try:
        found = certificate.read(checkpoint)
    except ValueError as error:
        return Reference(None, f"{missing}; {error}")
    if found is None or found.get("reference") is None:
        return Reference(None, f"{missing}, and no certificate has its values")
    return _from_certificate(
        subject, certificate.certificate_file(checkpoint.path), found, ""
    )


def _stored(subject: Subject, path: Path) -> Reference:
    """Reads a given certificate, which may belong to another copy of the weights."""
    content = certificate.read_file(path)
    if content.get("reference") is None:
        raise ValueError(f"{path} holds no values of an independent implementation")
    same = content["fingerprint"] == certificate.fingerprint(subject.checkpoint)
    note = "" if same else " for other bytes than these"
    return _from_certificate(subject, path, content, note)


def _from_certificate(
    subject: Subject, path: Path, content: dict, note: str
) -> Reference:
    try:
        expected = from_json(content["reference"])
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from None
    _check_sizes(expected, subject.config, str(path))
    about = f"{expected.name}, which {expected.how}, on {expected.made}"
    return Reference(expected, f"{about}; its values are kept in {path}{note}")


def _check_sizes(expected: Expected, config: ModelConfig, name: str) -> None:
    """Raises ValueError if the reference is of a model of another shape."""
    theirs = (expected.num_layers, expected.model_dim, expected.vocab_size)
    ours = (config.num_layers, config.model_dim, config.vocab_size)
    if theirs != ours:
        raise ValueError(
            f"{name} is of another model: its layers, width and vocabulary are "
            f"{theirs}, but those of this model are {ours}"
        )
    length = max(len(expected.tokens), expected.prompt_length + len(expected.greedy))
    if length > config.context_length:
        raise ValueError(
            f"{name} has a text of {length} tokens, more than the context of this "
            f"model, {config.context_length}"
        )
