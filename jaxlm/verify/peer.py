"""Hugging Face transformers, the independent implementation to compare models with.

torch and transformers are imported when they are used: both are large, and come with
the extra `parity`. Code beside a model is never run, and pickles are never read.
"""

import contextlib
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

NEEDED = ("torch", "transformers")
NEEDED_FOR_GGUF = ("gguf", "accelerate")
# A folder without any of these has no tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SPACE_SIGN = "\u2581"


def installed(*names: str) -> bool:
    """Returns whether all of these packages can be imported; imports none."""
    return all(find_spec(name) is not None for name in names)


def versions() -> dict[str, str]:
    """Returns the versions of torch and transformers."""
    return {name: version(name) for name in NEEDED}


class TransformersModel:
    """A model in float32 on the CPU, with eager attention."""

    def __init__(self, path: Path):
        """Loads a Hugging Face folder, or a .gguf file with transformers' own reader.

        jaxlm must have read a .gguf file first: transformers' reader trusts lengths.

        Raises:
          ValueError: if packages are missing, transformers cannot load it, or its
            tensors are not those of the model.
        """
        torch, hf = _import(path)
        self.name = f"transformers {hf.__version__}"
        folder, more = path, {"use_safetensors": True}
        if path.is_file():
            folder, more = path.parent, {"gguf_file": path.name}
        with _quiet(hf), _one_line(path):
            self._model, info = hf.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are listed below
                **more,
            )
        # transformers initializes missing tensors at random, with only a warning.
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            found = info.get(kind) or ()
            if found := sorted(x if isinstance(x, str) else str(x[0]) for x in found):
                raise ValueError(
                    f"transformers reports {kind.replace('_', ' ')} in {path}: "
                    f"{', '.join(found[:3])}"
                )
        self._model.eval()
        decoder = self._model.get_decoder()
        blocks = getattr(decoder, "layers", getattr(decoder, "h", None))
        if blocks is None:
            raise ValueError(
                f"jaxlm finds no list of layers in {type(self._model).__name__} of "
                "transformers"
            )
        self._blocks = blocks

    def run(
        self, tokens: Int[np.ndarray, "T"]
    ) -> tuple[Float32[np.ndarray, "T V"], Float32[np.ndarray, "S T D"]]:
        """Returns logits and the residual stream: embeddings, then after each layer."""
        import torch  # pyright: ignore[reportMissingImports]

        residual: list[Any] = []

        def before(_block, arguments, named):
            residual.append(arguments[0] if arguments else named["hidden_states"])

        def after(_block, _arguments, output):
            residual.append(output[0] if isinstance(output, tuple) else output)

        with contextlib.ExitStack() as hooks, torch.no_grad():
            first = self._blocks[0].register_forward_pre_hook(before, with_kwargs=True)
            hooks.callback(first.remove)
            for block in self._blocks:
                hooks.callback(block.register_forward_hook(after).remove)
            ids = torch.tensor(np.asarray(tokens)[None], dtype=torch.long)
            logits = self._model(input_ids=ids, use_cache=False).logits
        stages = torch.stack([x[0].float() for x in residual])
        return logits[0].float().numpy(), stages.numpy()


class TransformersTokenizer:
    """The tokenizer of a Hugging Face folder."""

    def __init__(self, folder: Path):
        """Loads it; raises ValueError if there is none, or transformers cannot."""
        _, hf = _import(folder)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(f"{folder} has no tokenizer")
        with _quiet(hf), _one_line(folder):
            self._tokenizer = hf.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        plain = (t.content for t in added if not t.special)
        self._matched = [text for text in plain if text.strip()]
        if type(self._tokenizer.backend_tokenizer.model).__name__ == "Unigram":
            self._matched.append("<0x")

    def encode(self, text: str) -> list[int] | None:
        """Encodes a text, with special tokens treated as text.

        Returns None for texts that cannot be compared: transformers always matches
        added tokens that are not special, treats U+2581 as a space after SentencePiece,
        and `<0x41>` as a byte in a Unigram model; and a vocabulary may lack characters.
        """
        if _SPACE_SIGN in text or any(word in text for word in self._matched):
            return None
        try:
            encoding = self._tokenizer(
                text, add_special_tokens=False, split_special_tokens=True
            )
        except Exception as error:
            if type(error) is Exception:  # All that the library has for this.
                return None
            raise
        return list(encoding.input_ids)

    def decode(self, ids: list[int]) -> str:
        """Decodes ids, without special tokens."""
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def first_ids(self) -> tuple[int, ...]:
        """Returns the ids that it puts before a text."""
        plain = self.encode("a")
        if plain is None:
            return tuple(self._tokenizer("").input_ids)
        whole = list(self._tokenizer("a").input_ids)
        for at in range(len(whole)):
            if whole[at : at + len(plain)] == plain:
                return tuple(whole[:at])
        return tuple(whole)


def _import(path: Path) -> tuple[ModuleType, ModuleType]:
    if not installed(*NEEDED):
        raise ValueError(
            f"to compare with {path}, torch and transformers are needed, the extra "
            "parity: pip install 'jaxlm[parity]'"
        )
    if path.is_file() and not installed(*NEEDED_FOR_GGUF):
        raise ValueError(
            f"transformers reads {path} only with more packages: pip install "
            f"{' '.join(NEEDED_FOR_GGUF)}"
        )
    try:
        # Of the extra `parity`.
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"torch or transformers is damaged: {error}") from None
    return torch, transformers


@contextlib.contextmanager
def _quiet(hf: ModuleType) -> Iterator[None]:
    """Silences transformers' progress bars and warnings about its own use."""
    logging = hf.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Its loaders raise any type.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"transformers cannot load {path}: {lines[0]}") from error
