"""Opens a checkpoint of any kind, and reads a model from it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.checkpoint import certificate
from jaxlm.checkpoint.gguf.gguf_model import GGUFCheckpoint
from jaxlm.checkpoint.hf import hf_folder
from jaxlm.checkpoint.hf.hf_folder import HFCheckpoint
from jaxlm.checkpoint.native.checkpoint_reader import NativeCheckpoint
from jaxlm.checkpoint.opened import Checkpoint, print_to_stderr
from jaxlm.config import ModelConfig, WeightKind
from jaxlm.files.hub import HUB, download
from jaxlm.model.initialization import init
from jaxlm.model.params import cast_matrices, parameter_shardings, quantize_matrices
from jaxlm.ops.linear import compute_dtype
from jaxlm.terminal.printable import shown_value
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

# Files to download from the Hub: weights that are not pickled, and small text files.
HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_checkpoint(
    path: str | Path, *, report: Callable[[str], None] = print_to_stderr
) -> Checkpoint:
    """Detects the kind of a checkpoint and reads its config.

    Open a path once and pass the result on: a run in training saves new steps and
    deletes old ones, so a second call may open another step.

    Args:
      path: a run or step folder, a Hugging Face folder, a .gguf file, or
        `hf:owner/name` (needs the extra `hub` and a network).
      report: gets a line for damaged steps and for values that are not finite, also
        while the parameters are read.

    Raises:
      ValueError: if it is none of these, or cannot be read; `NoUsableCheckpoint` if a
        run has steps but none can be read.
    """
    if not str(path):
        raise ValueError("the path of the checkpoint is empty")
    if str(path).startswith(HUB):
        path = download(str(path).removeprefix(HUB), HUB_FILES)
    path = Path(os.path.expanduser(path))
    if path.is_file():
        if path.suffix == ".safetensors":
            raise ValueError(
                f"{path} is one file of a model: give its folder, with config.json"
            )
        if path.suffix in _PICKLED:
            raise ValueError(
                f"{path} is pickled, and loading a pickle can run any code: if you "
                "trust it, convert it with transformers' save_pretrained"
            )
        return GGUFCheckpoint(path, report)
    if _is_hugging_face(path):
        return HFCheckpoint(path, report)
    return NativeCheckpoint(path, report)


def _is_hugging_face(path: Path) -> bool:
    """Tells the config.json of a Hugging Face model from that of a run."""
    if not (path / hf_folder.CONFIG).is_file():
        return False
    values = hf_folder.read_config(path)
    return "model_type" in values or "architectures" in values


def load(
    path: str | Path | Checkpoint,
    *,
    dtype: Any = None,
    shardings: Any = None,
    weights: WeightKind = "float",
    report: Callable[[str], None] = print_to_stderr,
) -> tuple[ModelConfig, Params]:
    """Reads a model.

    Args:
      path: as `open_checkpoint`, or its result.
      dtype: as `Checkpoint.params`.
      shardings: as `Checkpoint.params`.
      weights: `int8` or `int4` rounds the matrices, for a model that only generates or
        predicts; see `quantize_matrices`.
      report: as `open_checkpoint`; also gets the result of `jaxlm verify` if there is
        a certificate.

    Raises:
      ValueError: as `open_checkpoint` and `Checkpoint.params`, and for a dtype that is
        not floating-point.
    """
    _check_dtype(dtype)
    opened = isinstance(path, Checkpoint)
    checkpoint = path if opened else open_checkpoint(path, report=report)
    params = checkpoint.params(dtype=dtype, shardings=shardings)
    if line := certificate.summary(checkpoint):
        report(line)
    return checkpoint.config, quantize_matrices(params, weights)


def _check_dtype(dtype: Any) -> None:
    """Raises ValueError for what weights cannot be: of integers all would be 0."""
    try:
        is_floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise ValueError(
            f"dtype is {shown_value(str(dtype))}: weights are floating-point numbers, "
            "such as bfloat16"
        )


def load_onto_mesh(
    checkpoint: Checkpoint, weights: WeightKind = "float", dtype: str | None = None
) -> Params:
    """Reads the parameters directly onto the devices of the current mesh.

    Args:
      weights: as for `load`.
      dtype: of computing, as in a config: matrices are held in it, with the same
        result, so that not every call casts them. None: as the file has them.

    Raises:
      ValueError: as `Checkpoint.params`.
    """
    shapes = jax.eval_shape(lambda: init(checkpoint.config, jax.random.key(0)))
    shardings = parameter_shardings(shapes, jax.sharding.get_mesh())
    _, params = load(checkpoint, shardings=shardings, weights=weights)
    return params if dtype is None else cast_matrices(params, compute_dtype(dtype))


def load_tokenizer(
    path: str | Path, *, report: Callable[[str], None] = print_to_stderr
) -> Tokenizer:
    """Reads the tokenizer of a model; arguments and errors as `open_checkpoint`."""
    return open_checkpoint(path, report=report).tokenizer()
