"""`jaxlm convert`: a checkpoint of one kind as one of another."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from jaxlm.checkpoint.gguf import gguf_model as gguf
from jaxlm.checkpoint.hf.hf_folder import write_hf
from jaxlm.checkpoint.load import open_checkpoint
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.checkpoint.opened import Kind, print_to_stderr
from jaxlm.config import Config, DataConfig

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
    """Writes a checkpoint as one of another kind.

    Args:
      src: as `open_checkpoint`.
      dst: a new folder, or a new .gguf file.
      to: the kind; None is gguf for a name that ends so, else hf for a run of jaxlm
        and jaxlm for all others.
      dtype: of the parameters; None keeps what is stored (in GGUF: f16). q8_0 only in
        GGUF.
      with_tokenizer: False leaves the tokenizer out (not of a run of jaxlm).
      report: as `open_checkpoint`.

    Returns:
      The kind that was written.

    Raises:
      ValueError: when the source cannot be read, the kind cannot hold this model or
        its tokenizer, or the destination is there already.
    """
    if dst.exists():
        raise ValueError(f"{dst} is there already: choose another name, or remove it")
    opened = open_checkpoint(src, report=report)
    if to is None:
        natural: Kind = "hf" if opened.kind == "jaxlm" else "jaxlm"
        to = "gguf" if dst.suffix == ".gguf" else natural
    if dtype == "q8_0" and to != "gguf":
        raise ValueError(f"--dtype q8_0 is a type of GGUF files, not of {to}")
    if to == "jaxlm" and not with_tokenizer:
        raise ValueError("a run of jaxlm holds its tokenizer: it cannot be left out")
    tokenizer = opened.tokenizer() if with_tokenizer else None
    cast: np.dtype | None = None if dtype is None else gguf.TYPES[dtype]
    if to == "gguf":
        params = opened.params()
        gguf.write_model(dst, opened.config, params, tokenizer, dtype or "f16")
        return to
    params = opened.params(dtype=cast)
    if to == "hf":
        write_hf(dst, opened.config, params, tokenizer)
        return to
    assert tokenizer is not None
    length = min(DataConfig().sequence_length, opened.config.context_length)
    config = Config(model=opened.config, data=DataConfig(sequence_length=length))
    with CheckpointManager(dst, report=report) as checkpoints:
        checkpoints.save(
            0,
            params,
            {},
            config=config,
            tokenizer=tokenizer,
            data_fingerprint="",
            finite=True,
        )
    return to
