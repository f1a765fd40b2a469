"""Models to export, and the hashes of the exported files.

exported.json was written by `python tests/parity/exported_case.py`, with the code before
its files were moved into their present folders: changes of the code must not change the
exported bytes. Write it again only when a format changes on purpose.
"""

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from parity_case import nested, weights

from jaxlm.checkpoint.gguf.gguf_model import write_model
from jaxlm.checkpoint.hf.hf_folder import write_hf
from jaxlm.model.presets import preset, toy
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer

EXPORTED = Path(__file__).with_name("exported.json")
# Rows of a multiple of 32 values, the block size of Q8_0.
SIZES = {"vocab_size": 257, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2}
SIZES |= {"hidden_dim": 96}
MODELS = {
    "llama": dataclasses.replace(toy(preset("llama3.2-1b")), **SIZES),
    "qwen2": dataclasses.replace(toy(preset("qwen2-0.5b")), **SIZES),
    "gemma3": dataclasses.replace(
        toy(preset("gemma3-4b")), **SIZES, embedding_scale=64**0.5
    ),
    "phi3": dataclasses.replace(toy(preset("phi3-mini-128k")), **SIZES),
}
GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")


def exported_hashes(name: str, folder: Path) -> dict[str, str]:
    """Exports a model, and returns the SHA-256 of each file by name."""
    config, tokenizer = MODELS[name], ByteTokenizer()
    params = jax.tree.map(jnp.asarray, nested(weights(config)))
    write_hf(folder, config, params, tokenizer)
    for dtype in GGUF_DTYPES:
        write_model(folder / f"{dtype}.gguf", config, params, tokenizer, dtype)
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


if __name__ == "__main__":
    found = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = exported_hashes(name, Path(folder))
    EXPORTED.write_text(json.dumps(found, indent=1) + "\n")
