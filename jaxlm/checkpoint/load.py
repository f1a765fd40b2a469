"""`load` for every kind of checkpoint: of jaxlm, of Hugging Face, and GGUF files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jaxlm.checkpoint import certificate
from jaxlm.checkpoint.gguf.gguf_model import GGUFModel
from jaxlm.checkpoint.hf import hf_folder as hf
from jaxlm.checkpoint.hf.hf_folder import HuggingFaceFolder
from jaxlm.checkpoint.native import reading
from jaxlm.checkpoint.native.reading import say
from jaxlm.checkpoint.native.run_folder import candidates
from jaxlm.config import ModelConfig
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params

HUB = "hf:"
# What is fetched from the Hub: weights that are not pickled, and small text files.
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@runtime_checkable
class Source(Protocol):
    """A checkpoint of any kind, opened but not yet read."""

    kind: Literal["jaxlm", "hf", "gguf"]
    path: Path
    config: ModelConfig

    def params(
        self,
        *,
        dtype: Any = None,
        shardings: Any = None,
        report: Callable[[str], None],
    ) -> Params:
        """The parameters, as `load` gives them."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError when there is none."""
        ...


class Run:
    """A run or a step of jaxlm."""

    kind = "jaxlm"

    def __init__(self, path: Path, report: Callable[[str], None]):
        """Raises ValueError when the path is neither, or no step can be read."""
        self.path, self._report = path, report
        self.config = reading.load_config(path, report=report).model

    def params(
        self,
        *,
        dtype: Any = None,
        shardings: Any = None,
        report: Callable[[str], None],
    ) -> Params:
        """The parameters of the newest readable step."""
        _, params = reading.load(
            self.path, dtype=dtype, shardings=shardings, report=report
        )
        return params

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was saved with the step."""
        return reading.restore_tokenizer(self.path, report=self._report)


def open_source(path: str | Path, *, report: Callable[[str], None] = say) -> Source:
    """Finds out what a path is and reads its config.

    Args:
      path: a run or step folder, a Hugging Face folder, a .gguf file, or
        `hf:owner/name` (with the extra `hub` and a network).
      report: gets a line for steps that are damaged.

    Raises:
      ValueError: when it is none of these, or cannot be read.
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
        return GGUFModel(path)
    if _is_hugging_face(path):
        return HuggingFaceFolder(path)
    candidates(path)  # says what is wrong with the path
    return Run(path, report)


def _is_hugging_face(path: Path) -> bool:
    """A folder whose config.json is of a model: a run has one as well."""
    if not (path / hf.CONFIG).is_file():
        return False
    values = hf.read_json(path / hf.CONFIG)
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
    path: str | Path,
    *,
    dtype: Any = None,
    shardings: Any = None,
    report: Callable[[str], None] = say,
) -> tuple[ModelConfig, Params]:
    """Reads a model.

    Args:
      path: as `open_source`; of a run its newest readable step. Nothing is changed.
      dtype: floating-point parameters are cast to it; None keeps what is stored
        (float32 for quantized tensors).
      shardings: tree of `jax.sharding.Sharding`s in the structure of the parameters;
        None puts them onto the default device.
      report: gets a line for damaged steps, for values that are not finite, and for
        the certificate of `jaxlm verify`, where there is one.

    Raises:
      ValueError: when it cannot be read; `NoUsableCheckpoint` when a run has steps and
        none of them can.
    """
    source = open_source(path, report=report)
    params = source.params(dtype=dtype, shardings=shardings, report=report)
    if line := certificate.summary(source.path):
        report(line)
    return source.config, params


def load_config(
    path: str | Path, *, report: Callable[[str], None] = say
) -> ModelConfig:
    """The config of a model; arguments and errors as `load`."""
    return open_source(path, report=report).config


def load_tokenizer(
    path: str | Path, *, report: Callable[[str], None] = say
) -> Tokenizer:
    """The tokenizer of a model; arguments and errors as `load`."""
    return open_source(path, report=report).tokenizer()
