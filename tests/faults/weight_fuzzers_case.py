"""Fuzzers of weights, configs and checkpoints."""

import json

import jax.numpy as jnp
import numpy as np
from checkpoint_case import CONFIG, save
from fuzz_case import VALUES, as_json, changed, damaged, json_files, read_one_file
from hypothesis import strategies as st
from weights_case import (
    array,
    gguf,
    good_gguf,
    good_safetensors,
    key,
    read_all,
    safe,
    tensor,
    text,
)

from jaxlm.checkpoint import certificate
from jaxlm.checkpoint.gguf import gguf_config
from jaxlm.checkpoint.hf import hf_config, hf_config_writing
from jaxlm.checkpoint.hf.hf_folder import read_config
from jaxlm.checkpoint.hf.safetensors_folder import INDEX_FILE
from jaxlm.checkpoint.keys import Keys
from jaxlm.checkpoint.load import load, load_tokenizer
from jaxlm.checkpoint.native import integrity
from jaxlm.checkpoint.native.checkpoint_manager import CheckpointManager
from jaxlm.config import ModelConfig
from jaxlm.fields import from_dict, to_dict
from jaxlm.model.positions import rotations
from jaxlm.model.presets import PRESETS, preset
from jaxlm.tokenizers.bytes_and_characters import ByteTokenizer
from jaxlm.verify import expected

# Weights.

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.sampled_from(["F32", "BOOL", "I64", "F8_E4M3", "", "x", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("ab"), inner, max_size=2)
    ),
    max_leaves=6,
)
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BOOL", "F4"]) | _JSON,
        "shape": st.lists(st.integers(0, 9), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | _JSON,
    }
)
_HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]), _ENTRIES | _JSON
)


def safetensors(folder):
    path = folder / "a.safetensors"
    good_safetensors(path)
    headers = _HEADERS.map(lambda header: safe(header, bytes(40)))
    return damaged(path.read_bytes()) | headers, read_one_file(path, read_all)


def safetensors_index(folder):
    good_safetensors(folder / "1.safetensors")
    shards = dict.fromkeys("abcd", "1.safetensors")
    values = {"metadata": {"total_size": 1}, "weight_map": shards}
    names = st.sampled_from(["1.safetensors", "../1.safetensors", "2.safetensors"])
    path = folder / INDEX_FILE
    files = json_files(values, VALUES | names)
    return files, read_one_file(path, lambda _: read_all(folder))


_NAMES = st.sampled_from(["a", "b", "general.alignment", "", "x" * 70_000])
_NUMBERS = st.integers(0, 300) | st.sampled_from([1 << 31, 1 << 32, 1 << 62, 1 << 63])
_KEYS = st.one_of(
    st.builds(key, _NAMES, st.integers(0, 13), st.binary(max_size=20)),
    st.builds(
        lambda name, kind, count, data: key(name, 9, array(kind, count, data)),
        *(_NAMES, st.integers(0, 13), _NUMBERS, st.binary(max_size=80)),
    ),
    st.builds(
        lambda name, value, length: key(name, 8, text(value, length)),
        *(_NAMES, st.binary(max_size=9), st.none() | _NUMBERS),
    ),
)
_TENSORS = st.builds(
    tensor,
    _NAMES,
    st.lists(_NUMBERS, max_size=5),
    st.integers(0, 40),
    st.sampled_from([0, 32, 64, 8, 1 << 62]),
    st.none() | st.integers(0, 6),
)


def gguf_files(folder):
    path = folder / "a.gguf"
    good_gguf(path)
    built = st.builds(
        gguf,
        st.lists(_KEYS, max_size=3),
        st.lists(_TENSORS, max_size=3),
        st.binary(max_size=400),
        st.none() | _NUMBERS,
        st.none() | _NUMBERS,
    )
    return damaged(path.read_bytes()) | built, read_one_file(path, read_all)


# Configs.


def check_computable(config):
    """What is read can be computed: its rotations are finite."""
    if config.head_dim > 1 << 16:
        return  # It would take much memory here.
    rows = jnp.arange(3)[None] * (config.context_length // 4)
    for rotation in rotations(config, rows):
        if rotation is not None:
            assert all(jnp.isfinite(x).all() for x in rotation), config


def _families():
    """A config.json of each family, as published."""
    found = {}
    for name in PRESETS:
        try:
            values, _ = hf_config_writing.write(preset(name))
        except ValueError:
            continue  # of no family
        rope = values.get("rope_scaling") or {}
        kind = values["model_type"], rope.get("rope_type")
        found.setdefault(kind, json.loads(json.dumps(values)))
    return list(found.values())


def config_json(folder):
    families = _families()
    assert len({v["model_type"] for v in families}) >= 13
    # The text of a file is damaged with few families: that is their common parser.
    files = [json_files(v) for v in families[:2]]
    files += [changed(v).map(as_json) for v in families]

    def read(path):
        check_computable(hf_config.read(Keys(read_config(path.parent), str(path))))

    return st.one_of(files), read_one_file(folder / "config.json", read)


def gguf_keys(folder):
    names = ["llama3.2-1b", "qwen2.5-0.5b", "gemma2-2b", "phi3-mini-128k"]
    good = []
    for name in names:
        config = preset(name)
        _, metadata, _ = gguf_config.write_config(config)
        rest = (config.vocab_size, config.tied_embeddings)
        good.append((metadata, (*rest, gguf_config.rope_tensors(config))))
    values = st.sampled_from(good).flatmap(
        lambda pair: st.tuples(changed(pair[0]), st.just(pair[1]))
    )

    def read(value):
        check_computable(gguf_config.read_config(*value[:1], *value[1], "a.gguf"))

    return values, read


def run_config(folder):
    """A config as runs and steps keep it."""
    path = folder / "config.json"
    good = to_dict(CONFIG)["model"]

    def read(path):
        check_computable(from_dict(ModelConfig, read_config(path.parent)))

    return json_files(good), read_one_file(path, read)


# Checkpoints.


def steps(folder):
    """A step of somebody else, whose manifest was written after the damage."""
    step = folder / "run/checkpoints/3"
    with CheckpointManager(folder / "run") as checkpoints:
        save(checkpoints, 3, tokenizer=ByteTokenizer())
    names = sorted(p.relative_to(step) for p in step.rglob("*") if p.is_file())
    good = {str(n): (step / n).read_bytes() for n in names}
    meta = json.loads(good["meta.json"])
    values = st.one_of(
        st.tuples(st.just("meta.json"), changed(meta).map(as_json)),
        st.sampled_from(sorted(good)).flatmap(
            lambda name: st.tuples(st.just(name), damaged(good[name]))
        ),
    )

    def read(value):
        name, content = value
        (step / name).write_bytes(content)
        if name != integrity.MANIFEST:
            (step / integrity.MANIFEST).unlink(missing_ok=True)
            integrity.write_manifest(step)
        try:
            load(step)
            load_tokenizer(step)
        finally:
            for name, content in good.items():
                (step / name).write_bytes(content)

    return values, read


def _expected():
    numbers = np.arange(12, dtype=np.float32)
    return expected.Expected(
        name="x", how="y", made="2026-01-01", versions={"torch": "2"}, model_dim=2,
        vocab_size=9, tokens=np.arange(4, dtype=np.int32),
        rows=np.arange(4, dtype=np.int32), ids=None,
        logits=np.ones((4, 9), np.float32), log_sums=np.ones(4, np.float32),
        logit_spread=1.0, places=None, residual=np.ones((3, 4, 2), np.float32),
        spreads=np.ones(3, np.float32), prompt_length=2,
        greedy=np.arange(3, dtype=np.int32), gaps=numbers[:3],
        texts=(expected.TextIds("a", (1, 2), "a"),), first_ids=(1,), texts_how="z",
    )  # fmt: skip


def certificates(folder):
    values = {"format": certificate.FORMAT, "fingerprint": "0" * 64, "passed": True}
    values |= {"dates": {"a": [1, 2]}, "summary": "good"}
    values["reference"] = json.loads(json.dumps(_expected().to_json()))

    def read(path):
        reference = certificate.read_file(path).get("reference")
        if reference is not None:
            expected.from_json(reference)

    return json_files(values), read_one_file(folder / certificate.NAME, read)


FUZZERS = {
    "safetensors": (safetensors, 100),
    "safetensors index": (safetensors_index, 50),
    "gguf": (gguf_files, 50),
    "config.json": (config_json, 50),
    "gguf keys": (gguf_keys, 50),
    "config of a run": (run_config, 50),
    "step folder": (steps, 40),
    "certificate": (certificates, 50),
}
