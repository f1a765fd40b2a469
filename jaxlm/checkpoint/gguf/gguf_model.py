"""GGUF models of llama.cpp: how each tensor becomes a parameter, and back.

The rules name a tensor, the path of the parameter, and the letters of both shapes.
`tensor_mapping.py` applies them; `gguf_file.py` reads the file and `gguf_blocks.py`
decodes its blocks.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoint.finite import narrowed
from jaxlm.checkpoint.gguf.gguf_config import (
    ROPE_TENSORS,
    read_config,
    rope_tensors,
    write_config,
)
from jaxlm.checkpoint.gguf.gguf_file import MAGIC, read_gguf
from jaxlm.checkpoint.gguf.gguf_writing import write_gguf
from jaxlm.checkpoint.opened import Kind, print_to_stderr
from jaxlm.checkpoint.tensor_file import BFLOAT16, StoredTensor
from jaxlm.checkpoint.tensor_mapping import QKV, Rule, TensorMapping, linear, rule
from jaxlm.config import ModelConfig
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.gguf import gguf_metadata, tokenizer_from_gguf
from jaxlm.types import Params

_B = "blk.{layer}."
# Tensor types that can be written, and the dtype of the values for each.
TYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": BFLOAT16,
    "q8_0": np.dtype(np.float32),
}


def _common(offset: float = 0.0) -> tuple[Rule, ...]:
    def norm(name: str, path: str, axis: str = "D") -> Rule:
        return rule(f"{name}.weight", f"{path}/scale", f"{axis} -> {axis}", offset)

    return (
        rule("token_embd.weight", "embed/table", "V D -> V D"),
        rule("output.weight", "lm_head/kernel", "V D -> D V"),
        norm("output_norm", "final_norm"),
        norm(_B + "attn_norm", "layers/attn_norm"),
        norm(_B + "ffn_norm", "layers/mlp_norm"),
        norm(_B + "post_attention_norm", "layers/attn_output_norm"),
        norm(_B + "post_ffw_norm", "layers/mlp_output_norm"),
        norm(_B + "attn_q_norm", "layers/attn/q_norm", "H"),
        norm(_B + "attn_k_norm", "layers/attn/k_norm", "H"),
        *linear((_B + "attn_output", "layers/attn/o", "D (N H) -> N H D")),
        rule(_B + "ffn_down.weight", "layers/mlp/down", "D F -> F D"),
    )


_VALUE = linear((_B + "attn_v", "layers/attn/v", "(K H) D -> D K H"))
_GATE_UP = (
    rule(_B + "ffn_gate.weight", "layers/mlp/gate", "F D -> D F"),
    rule(_B + "ffn_up.weight", "layers/mlp/up", "F D -> D F"),
)
_HALVES = linear(
    (_B + "attn_q", "layers/attn/q", "(N H) D -> D N H"),
    (_B + "attn_k", "layers/attn/k", "(K H) D -> D K H"),
)
# llama.cpp rotates adjacent values in this architecture, so its files order the rows of
# each head as h pairs of p = 2 rows, where ours are p halves of h rows.
_PAIRS = linear(
    (_B + "attn_q", "layers/attn/q", "(N h p) D -> D N (p h)"),
    (_B + "attn_k", "layers/attn/k", "(K h p) D -> D K (p h)"),
)
_EXPERTS = (
    rule(_B + "ffn_gate_inp.weight", "layers/moe/router", "E D -> D E"),
    rule(_B + "ffn_gate_exps.weight", "layers/moe/gate", "E F D -> E D F"),
    rule(_B + "ffn_up_exps.weight", "layers/moe/up", "E F D -> E D F"),
    rule(_B + "ffn_down_exps.weight", "layers/moe/down", "E D F -> E F D"),
)
_FUSED = (
    Rule(_B + "attn_qkv.weight", QKV),
    rule(_B + "ffn_up.weight", ("layers/mlp/gate", "layers/mlp/up"), "(j F) D -> D F"),
)
_PLAIN = (*_common(), *_HALVES, *_VALUE, *_GATE_UP)
# The files store Gemma's norm scales with 1 already added.
_GEMMA = (*_common(offset=1.0), *_HALVES, *_VALUE, *_GATE_UP)

RULES: Mapping[str, tuple[Rule, ...]] = {
    "llama": (*_common(), *_PAIRS, *_VALUE, *_GATE_UP, *_EXPERTS),
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3moe": (*_PLAIN, *_EXPERTS),
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": (*_common(), *_FUSED),
}


class GGUFCheckpoint:
    """A model in one GGUF file."""

    kind: Kind = "gguf"

    def __init__(self, path: Path, report: Callable[[str], None]):
        """Reads the keys of the file; arguments and errors as `open_checkpoint`."""
        self.path, self._report = path, report
        file = read_gguf(path)
        self._metadata = file.metadata
        self._tensors: dict[str, StoredTensor] = dict(file.tensors)
        table = self._tensors.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise ValueError(f"{path} has no matrix token_embd.weight")
        divisors: dict[str, np.ndarray] = {}
        for name in ROPE_TENSORS:
            if (tensor := self._tensors.pop(name, None)) is None:
                continue
            if len(tensor.shape) != 1 or tensor.shape[0] > 1 << 16:
                raise ValueError(f"{tensor.where} has shape {list(tensor.shape)}")
            divisors[name] = tensor.read()
        tied = "output.weight" not in self._tensors
        try:
            self.config = read_config(
                self._metadata, table.shape[0], tied, divisors, str(path)
            )
        except ValueError as error:
            known = str(error).startswith(str(path))
            raise ValueError(f"{'' if known else f'{path}: '}{error}") from None
        self.family = str(self._metadata["general.architecture"])

    def params(self, *, dtype: Any = None, shardings: Any = None) -> Params:
        """As `Checkpoint.params`."""
        mapping = TensorMapping(self.config, RULES[self.family])
        mapping.check(self._tensors, (), str(self.path))
        return mapping.read(
            self._tensors, dtype=dtype, shardings=shardings, report=self._report
        )

    def tokenizer(self) -> Tokenizer:
        """Reads the tokenizer; raises ValueError if there is none of a known kind."""
        try:
            return tokenizer_from_gguf(self._metadata)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def files(self) -> list[Path]:
        """Returns the file itself."""
        return [self.path]


def write_model(
    path: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    dtype: str = "f16",
    report: Callable[[str], None] = print_to_stderr,
    earlier: bytes | None = MAGIC,
) -> None:
    """Writes a model for llama.cpp to run.

    Args:
      path: the .gguf file.
      tokenizer: None leaves it out.
      dtype: type of the matrices: f32, f16, bf16 or q8_0. Vectors are f32, as
        llama.cpp requires. With q8_0, matrices whose rows are not whole blocks of 32
        values are f16, as llama.cpp's own quantizer writes them.
      report: gets a line if there are such matrices.
      earlier: as for `durable.replacing`.

    Raises:
      ValueError: if llama.cpp has no architecture for this model, or cannot run the
        tokenizer.
    """
    arch, metadata, table_factor = write_config(config)
    if tokenizer is not None:
        metadata |= gguf_metadata(tokenizer, config.vocab_size)
    mapping = TensorMapping(config, RULES[arch])
    f32 = np.dtype(np.float32)
    specs, read = mapping.write(params, f32, table_factor)
    divisors = rope_tensors(config)

    typed = {n: (x.shape, "F32") for n, x in divisors.items()}
    for name, (shape, _) in specs.items():
        kind = "f16" if dtype == "q8_0" and shape[-1] % 32 else dtype
        typed[name] = (shape, "F32" if len(shape) == 1 else kind.upper())
    matrices = [n for n, (shape, _) in typed.items() if len(shape) > 1]
    if wide := [n for n in matrices if typed[n][1] != dtype.upper()]:
        size = typed[wide[0]][0][-1]
        report(
            f"{len(wide)} of {len(matrices)} matrices are F16, as their rows are not "
            f"whole blocks of 32 values: those of {wide[0]} have {size}"
        )

    def values(name: str) -> np.ndarray:
        if name in divisors:
            return divisors[name].astype(f32)
        return narrowed(read(name), TYPES[typed[name][1].lower()], name)

    write_gguf(path, metadata, typed, values, earlier)
