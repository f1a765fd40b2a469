"""Folders in the layout of Hugging Face: config.json, safetensors, tokenizer files.

Nothing in a folder is ever executed: `auto_map` and pickled weights are not touched.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoint.hf import hf_config, hf_config_writing, hf_names
from jaxlm.checkpoint.hf.mxfp4 import decode_mxfp4
from jaxlm.checkpoint.hf.safetensors_folder import read_folder, write_folder
from jaxlm.checkpoint.keys import Keys
from jaxlm.checkpoint.opened import Kind
from jaxlm.checkpoint.tensor_file import BFLOAT16, StoredTensor
from jaxlm.checkpoint.tensor_mapping import TensorMapping
from jaxlm.config import ModelConfig
from jaxlm.files.durable import replacing
from jaxlm.files.folder_links import path_inside
from jaxlm.files.strict_json import parse_object
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.tokenizers.hugging_face.tokenizer_export import write_hugging_face
from jaxlm.tokenizers.hugging_face.tokenizer_files import tokenizer_from_folder
from jaxlm.types import Params

CONFIG = "config.json"
_ADAPTER = "adapter_config.json"  # transformers applies its weights by itself
# The largest published ones have about 10 kB, except for lists of labels.
MAX_CONFIG_BYTES = 4 << 20


class HFCheckpoint:
    """A model in a folder with a config.json of a known family."""

    kind: Kind = "hf"

    def __init__(self, folder: Path, report: Callable[[str], None]):
        """Reads config.json; arguments and errors as `open_checkpoint`."""
        self.path, self._report = folder, report
        if (folder / _ADAPTER).is_file():
            raise ValueError(
                f"{folder / _ADAPTER}: jaxlm does not read adapters: merge it into the "
                "weights that it changes, in a new folder, or remove it"
            )
        values = read_config(folder)
        self.family = str(values.get("model_type"))
        self.config = hf_config.read(Keys(values, str(folder / CONFIG)))

    def params(self, *, dtype: Any = None, shardings: Any = None) -> Params:
        """As `Checkpoint.params`."""
        mapping = TensorMapping(self.config, hf_names.RULES[self.family])
        tensors = _rename(read_folder(self.path), self.family)
        if self.family == "gpt_oss":
            tensors = _decode(tensors)
        _drop_tied_head(tensors, self.family, self.config)
        ignored = hf_names.unused(self.family)
        mapping.check(tensors, ignored, str(self.path))
        return mapping.read(
            tensors, dtype=dtype, shardings=shardings, report=self._report
        )

    def tokenizer(self) -> Tokenizer:
        """Reads the tokenizer; raises ValueError if there is none of a known kind."""
        return tokenizer_from_folder(self.path)

    def files(self) -> list[Path]:
        """Lists the weights, their index and config.json."""
        patterns = ("*.safetensors", "*.safetensors.index.json", CONFIG)
        return sorted(f for pattern in patterns for f in self.path.glob(pattern))


def write_hf(
    folder: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    dtype: Any = None,
) -> None:
    """Writes a model for transformers to load.

    Args:
      folder: created if missing; must not contain weights.
      tokenizer: None leaves its files out.
      dtype: dtype of the tensors; None keeps that of each parameter.

    Raises:
      ValueError: if no family of transformers computes this model, or the tokenizer
        cannot be written in its format.
    """
    values, table_factor = hf_config_writing.write(config)
    mapping = TensorMapping(config, hf_names.RULES[values["model_type"]])
    specs, read = mapping.write(params, dtype, table_factor)
    stored = {d for _, d in specs.values()}
    values["dtype"] = stored.pop().name if len(stored) == 1 else "float32"
    for token in ("bos", "eos", "pad"):
        values[f"{token}_token_id"] = getattr(tokenizer, f"{token}_id", None)
    write_folder(folder, specs, read)
    if tokenizer is not None:
        write_hugging_face(tokenizer, folder)
    # Written last: without it the folder is not recognized as a model.
    with replacing(folder / CONFIG) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a folder.

    Raises:
      ValueError: if it is missing, too large, a link that leads out of the folder, or
        not an object with unique names.
    """
    path = path_inside(folder, CONFIG)
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has more than {MAX_CONFIG_BYTES} bytes")
    return parse_object(path.read_bytes(), str(path))


def _rename(
    tensors: Mapping[str, StoredTensor], model_type: str
) -> dict[str, StoredTensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, new in hf_names.RENAMED.get(model_type, ()):
            name = re.sub(pattern, new, name)
        if name in renamed:
            raise ValueError(f"{tensor.where} is duplicated under two names")
        renamed[name] = tensor
    return renamed


def _drop_tied_head(
    tensors: dict[str, StoredTensor], model_type: str, config: ModelConfig
) -> None:
    """Drops the copy of the embeddings that some files store for the tied head.

    Raises:
      ValueError: if it is not an exact copy.
    """
    if not config.tied_embeddings:
        return
    names = {r.parts[0][0]: r.name for r in hf_names.RULES[model_type]}
    head = tensors.pop(names["lm_head/kernel"], None)
    table = tensors.get(names["embed/table"])
    if head is None or table is None:
        return
    head_bits, table_bits = (
        np.ascontiguousarray(x.read()).view(np.uint8) for x in (head, table)
    )
    if not np.array_equal(head_bits, table_bits):
        raise ValueError(
            f"{head.where} differs from {table.name}, but config.json ties them "
            "(tie_word_embeddings): one of the two is wrong"
        )


def _decode(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Replaces the MXFP4 pairs `NAME_blocks`, `NAME_scales` of gpt-oss by tensors NAME.

    Blocks lie along the last axis, which is the input axis; NAME is (in, out). bfloat16
    holds the values exactly.
    """
    out = dict(tensors)
    for name in [n for n in tensors if n.endswith("_blocks")]:
        blocks = out.pop(name)
        stem = name.removesuffix("_blocks")
        scales = out.pop(f"{stem}_scales", None)
        if scales is None or blocks.shape != (*scales.shape, 16) or blocks.shape == ():
            raise ValueError(
                f"{blocks.where}: {stem}_scales is missing or of another shape"
            )
        if {blocks.dtype, scales.dtype} != {np.dtype(np.uint8)}:
            raise ValueError(f"{blocks.where}: MXFP4 blocks and scales must be bytes")
        *experts, rows, groups = scales.shape

        def read(blocks=blocks, scales=scales) -> np.ndarray:
            values = decode_mxfp4(blocks.read(), scales.read(), BFLOAT16)
            return np.swapaxes(values, -1, -2)

        out[stem] = dataclasses.replace(
            blocks,
            name=stem,
            shape=(*experts, groups * 32, rows),
            dtype=BFLOAT16,
            stored_as="MXFP4",
            _read=read,
        )
    return out
