"""The door: opening a path of any kind, and reading a model from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.checkpoint import certificate
from jaxlm.checkpoint.gguf.gguf_model import GGUFCheckpoint
from jaxlm.checkpoint.hf import hf_folder
from jaxlm.checkpoint.hf.hf_folder import HFCheckpoint
from jaxlm.checkpoint.native.native_checkpoint import NativeCheckpoint
from jaxlm.checkpoint.opened import Checkpoint, print_to_stderr
from jaxlm.config import ModelConfig
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

HUB = "hf:"
# What is fetched from the Hub: weights that are not pickled, and small text files.
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_checkpoint(
    path: str | Path, *, report: Callable[[str], None] = print_to_stderr
) -> Checkpoint:
    """Finds out what a path is and reads its config.

    Open a path once and pass the result on: a run in training saves new steps and
    deletes old ones, so what is opened twice may not be the same.

    Args:
      path: a run or step folder, a Hugging Face folder, a .gguf file, or
        `hf:owner/name` (with the extra `hub` and a network).
      report: gets a line for steps that are damaged and for values that are not finite,
        also while the parameters are read.

    Raises:
      ValueError: when it is none of these, or cannot be read; `NoUsableCheckpoint` when
        a run has steps and none of them can.
    """
    if str(path).startswith(HUB):
        path = download(str(path).removeprefix(HUB))
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix == ".safetensors":
            raise ValueError(
                f"{path} is one file of a model: name its folder, with config.json"
            )
        if path.suffix in _PICKLED:
            raise ValueError(
                f"{path} is pickled, and loading it could run any program: convert it "
                "where you trust it, with transformers' save_pretrained"
            )
        return GGUFCheckpoint(path, report)
    if _is_hugging_face(path):
        return HFCheckpoint(path, report)
    return NativeCheckpoint(path, report)


def _is_hugging_face(path: Path) -> bool:
    """Whether a folder has the config.json of a model; a run has one of its own."""
    if not (path / hf_folder.CONFIG).is_file():
        return False
    values = hf_folder.read_json(path / hf_folder.CONFIG)
    return "model_type" in values or "architectures" in values


def download(name: str) -> Path:
    """The folder of a model from the Hugging Face Hub, fetched when it is not there.

    Raises:
      ValueError: without the extra `hub`, without a network, and for unknown names.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{HUB}{name} needs the extra hub: pip install 'jaxlm[hub]'"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=list(_HUB_FILES)
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{HUB}{name} cannot be fetched ({reason}): is there a network, is the "
            "name right, and is the model open to you?"
        ) from None
    return Path(folder)


def load(
    path: str | Path | Checkpoint,
    *,
    dtype: Any = None,
    shardings: Any = None,
    report: Callable[[str], None] = print_to_stderr,
) -> tuple[ModelConfig, Params]:
    """Reads a model.

    Args:
      path: as `open_checkpoint`, or what that gave.
      dtype: as `Checkpoint.params`.
      shardings: as `Checkpoint.params`.
      report: as `open_checkpoint`; also gets the result of `jaxlm verify`, where there
        is a certificate of it.

    Raises:
      ValueError: as `open_checkpoint` and `Checkpoint.params`.
    """
    if isinstance(path, str | Path):
        path = open_checkpoint(path, report=report)
    params = path.params(dtype=dtype, shardings=shardings)
    if line := certificate.summary(path):
        report(line)
    return path.config, params


def load_tokenizer(
    path: str | Path, *, report: Callable[[str], None] = print_to_stderr
) -> Tokenizer:
    """The tokenizer of a model; arguments and errors as `open_checkpoint`."""
    return open_checkpoint(path, report=report).tokenizer()
