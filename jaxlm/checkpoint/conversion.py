"""`jaxlm convert`: converts a checkpoint to another kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from jaxlm import tree
from jaxlm.checkpoint.finite import is_finite
from jaxlm.checkpoint.gguf import gguf_model as gguf
from jaxlm.checkpoint.hf.hf_folder import write_hf
from jaxlm.checkpoint.load import open_checkpoint
from jaxlm.checkpoint.native.run_folder import check_no_step, is_new
from jaxlm.checkpoint.opened import Kind, print_to_stderr
from jaxlm.checkpoint.save import save
from jaxlm.fields import nearest
from jaxlm.files import durable
from jaxlm.files.local_path import local_path

DType = Literal["f32", "f16", "bf16", "q8_0"]


def convert(
    src: str | Path,
    dst: Path,
    *,
    to: Kind | None = None,
    dtype: DType | None = None,
    with_tokenizer: bool = True,
    report: Callable[[str], None] = print_to_stderr,
) -> Kind:
    """Converts a checkpoint to another kind.

    Args:
      src: as `open_checkpoint`.
      dst: a new folder, or a new .gguf file.
      to: the kind to write. None means gguf if the name ends in .gguf, else hf for a
        jaxlm run, and jaxlm for everything else.
      dtype: dtype of the parameters; None keeps the stored one (for GGUF: f16). q8_0
        is for GGUF only.
      with_tokenizer: False leaves the tokenizer out, which a jaxlm run cannot do.
      report: as `open_checkpoint`.

    Returns:
      The kind that was written.

    Raises:
      ValueError: if the source cannot be read, the kind cannot express this model or
        its tokenizer, or the destination already exists, is a URL, has the name of
        another kind, or is in a step of a run.
    """
    dst = local_path(dst, "the destination")
    exists = f"{dst} already exists: choose another name, or remove it"
    if dst.exists() and not is_new(dst):
        raise ValueError(exists)
    check_no_step(dst)
    _check_name(dst, to)
    opened = open_checkpoint(src, report=report)
    if to is None:
        default: Kind = "hf" if opened.kind == "jaxlm" else "jaxlm"
        to = "gguf" if dst.suffix == ".gguf" else default
    if to != "jaxlm" and dst.exists():  # `save` goes on where it was interrupted.
        raise ValueError(exists)
    if dtype == "q8_0" and to != "gguf":
        raise ValueError(f"--dtype q8_0 is only for gguf, not for {to}")
    if to == "jaxlm" and not with_tokenizer:
        raise ValueError("a jaxlm run contains its tokenizer: it cannot be left out")
    tokenizer = opened.tokenizer() if with_tokenizer else None
    durable.remove_abandoned(dst)
    if to == "gguf":
        params = opened.params()
        dst.parent.mkdir(parents=True, exist_ok=True)
        kind = dtype or "f16"
        gguf.write_model(
            *(dst, opened.config, params, tokenizer, kind, report), earlier=None
        )
        return to
    stored = None if dtype is None else gguf.TYPES[dtype]
    if to == "hf":
        params = opened.params()
        with durable.new_folder(dst) as folder:
            write_hf(folder, opened.config, params, tokenizer, stored)
        return to
    params = opened.params(dtype=stored)
    if stored is not None:
        for name, leaf in tree.flatten(params).items():
            if not is_finite(np.asarray(leaf)):
                raise ValueError(f"{name} has values that {stored.name} cannot hold")
    assert tokenizer is not None
    save(dst, opened.config, params, tokenizer, report=report)
    return to


def _check_name(dst: Path, to: Kind | None) -> None:
    """Raises ValueError for a GGUF file, or what seems to be one, not named .gguf."""
    if dst.suffix == ".gguf":
        return
    if to == "gguf":
        raise ValueError(f"the name of a GGUF file ends in .gguf: write {dst}.gguf")
    if to is None and nearest(dst.suffix.lower(), [".gguf"]):
        raise ValueError(
            f"{dst}: did you mean {dst.with_suffix('.gguf')}? --to hf or --to jaxlm "
            "writes a folder of this name"
        )
