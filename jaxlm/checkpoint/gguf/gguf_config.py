"""Converts the keys of GGUF files to a `ModelConfig` and back, by architecture.

Sources: the GGUF specification, and llama.cpp for what the files leave open (layer
patterns, scales).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from jaxlm.checkpoint.families import choose
from jaxlm.checkpoint.keys import MAX_LAYERS, Keys
from jaxlm.config import ModelConfig, RopeScaling
from jaxlm.ops.rope import frequencies, llama3_frequencies, longrope_attention_factor
from jaxlm.terminal.printable import shown

ROPE_FREQS = "rope_freqs.weight"
ROPE_SHORT, ROPE_LONG = "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_SHORT, ROPE_LONG)
# Sections of the metadata that do not describe the model.
_OTHER = ("general.", "tokenizer.", "quantize.", "imatrix.", "mradermacher.")
# RoPE scalings of Llama 3, which the files store only as divisors.
_LLAMA3 = tuple(
    RopeScaling(
        kind="llama3",
        factor=factor,
        original_context_length=8192,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
    )
    for factor in (8.0, 32.0)
)


def _read_shared(keys: Keys, vocab_size: int, tied: bool) -> dict[str, Any]:
    width, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", max(width // heads, 1))
    keys.must("attention.value_length", head_dim)
    keys.must("vocab_size", vocab_size)
    rotary = keys.count("rope.dimension_count", head_dim)
    return {
        "vocab_size": vocab_size,
        "num_layers": keys.count("block_count", most=MAX_LAYERS),
        "model_dim": width,
        "num_heads": heads,
        "num_kv_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_dim": keys.count("feed_forward_length"),
        "context_length": keys.count("context_length"),
        "norm_epsilon": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.positive("rope.freq_base", 10_000.0),
        "rope_fraction": rotary / head_dim,
        "tied_embeddings": tied,
    }


def _read_scaling(
    keys: Keys, shared: Mapping[str, Any], divisors: Mapping[str, np.ndarray]
) -> RopeScaling | None:
    kinds = {k: k for k in ("none", "linear", "yarn", "longrope")}
    # A factor alone, also under its older name, means linear scaling.
    kind = keys.choice("rope.scaling.type", kinds, "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    original = keys.count("rope.scaling.original_context_length", None)
    attention_factor = keys.number("rope.scaling.attn_factor", None)
    keys.drop("rope.scaling.finetuned")
    scaled = kind == "yarn" or (kind == "linear" and factor != 1.0)
    if divisors and scaled:
        raise ValueError(
            f"{keys.where}: {', '.join(divisors)} beside rope.scaling.type {kind}"
        )
    if ROPE_FREQS in divisors:
        if len(divisors) > 1:
            raise ValueError(f"{keys.where}: {' beside '.join(divisors)}")
        return _from_divisors(shared, _shortest(divisors[ROPE_FREQS]))
    if divisors:
        if set(divisors) != {ROPE_SHORT, ROPE_LONG}:
            raise ValueError(f"{keys.where}: {ROPE_SHORT} or {ROPE_LONG} is missing")
        length = original or shared["context_length"]
        scaling = RopeScaling(
            kind="longrope",
            original_context_length=length,
            short_factors=_shortest(divisors[ROPE_SHORT]),
            long_factors=_shortest(divisors[ROPE_LONG]),
            attention_factor=attention_factor,
        )
        extension = shared["context_length"] / length
        if _is_default(attention_factor, extension, length):
            return dataclasses.replace(scaling, attention_factor=None)
        return scaling
    if kind == "longrope":
        raise ValueError(f"{keys.where}: {ROPE_SHORT} or {ROPE_LONG} is missing")
    if attention_factor not in (None, 1.0):
        raise ValueError(
            f"{keys.where}: rope.scaling.attn_factor is {attention_factor}, which this "
            "jaxlm does not compute without longrope"
        )
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_context_length=original or shared["context_length"],
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        )
    if factor == 1.0 or kind == "none":
        return None
    return RopeScaling(kind="linear", factor=factor)


def _shortest(x: Any) -> Any:
    """Rounds floats to the fewest digits that give the same f32."""
    if isinstance(x, float):
        with np.errstate(over="ignore"):  # Keys refuses infinity.
            return float(str(np.float32(x)))
    return tuple(float(str(v)) for v in np.asarray(x, np.float32))


def _is_default(given: float | None, factor: float, length: int) -> bool:
    """Whether the formula gives this factor of LongRoPE for cos and sin."""
    if given is None or length < 2:
        return False
    formula = longrope_attention_factor(factor, length)
    return math.isclose(given, formula, rel_tol=1e-5)


def _from_divisors(
    shared: Mapping[str, Any], divisors: tuple[float, ...]
) -> RopeScaling:
    """Recognizes Llama 3's scaling, or keeps one divisor for each rotary pair."""
    for scaling in _LLAMA3:
        expected = _llama3_divisors(shared["head_dim"], shared["rope_theta"], scaling)
        if len(expected) == len(divisors) and np.allclose(divisors, expected, 1e-5):
            return scaling
    return RopeScaling(
        kind="longrope",
        original_context_length=shared["context_length"],
        short_factors=divisors,
        long_factors=divisors,
        attention_factor=1.0,
    )


def _llama3_divisors(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    base = frequencies(head_dim, theta)
    scaled = llama3_frequencies(
        base,
        factor=scaling.factor,
        low=scaling.low_frequency_factor,
        high=scaling.high_frequency_factor,
        original=scaling.original_context_length,
    )
    return base / scaled


def _read_experts(keys: Keys) -> dict[str, Any]:
    experts = keys.index("expert_count", 0)
    used = keys.index("expert_used_count", 0)
    return {"num_experts": experts, "experts_per_token": used if experts else 0}


def _read_llama(keys: Keys, shared: Mapping[str, Any]) -> dict[str, Any]:
    if shared["rope_fraction"] != 1.0:
        # The files would pair other values than ours.
        raise ValueError(
            f"{keys.where}: rope.dimension_count is not the whole head, "
            f"{shared['head_dim']}"
        )
    return _read_experts(keys)


def _check_heads(keys: Keys, shared: Mapping[str, Any]) -> None:
    """Raises ValueError for a head size that llama.cpp rejects in this architecture."""
    if shared["num_heads"] * shared["head_dim"] != shared["model_dim"]:
        raise ValueError(
            f"{keys.where}: {shared['num_heads']} heads of {shared['head_dim']} are "
            f"not embedding_length {shared['model_dim']}"
        )


def _read_qwen2(keys: Keys, shared: Mapping[str, Any]) -> dict[str, Any]:
    _check_heads(keys, shared)
    return {"attention_bias": True}


def _read_qwen3moe(keys: Keys, _: Mapping[str, Any]) -> dict[str, Any]:
    hidden = keys.count("expert_feed_forward_length")
    return {**_read_experts(keys), "hidden_dim": hidden, "qk_norm": "head"}


def _read_gemma(_: Keys, shared: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "activation": "gelu_tanh",
        "norm": "rms_unit_offset",
        "embedding_scale": math.sqrt(shared["model_dim"]),
    }


def _large_scale(shared: Mapping[str, Any], layers_of_27b: int) -> float:
    """Scales the 27B models by width / heads, and the others by the head size."""
    if shared["num_layers"] == layers_of_27b:
        return (shared["model_dim"] / shared["num_heads"]) ** -0.5
    return shared["head_dim"] ** -0.5


def _read_gemma2(keys: Keys, shared: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_read_gemma(keys, shared),
        **_local(keys, shared, ("local", "global"), 4096),
        "attention_scale": _large_scale(shared, 46),
        "attention_soft_cap": keys.number("attn_logit_softcapping", 50.0),
        "final_soft_cap": keys.number("final_logit_softcapping", 30.0),
        "norm_placement": "both",
    }


def _read_gemma3(keys: Keys, shared: Mapping[str, Any]) -> dict[str, Any]:
    pattern = ("local",) * 5 + ("global",)
    keys.must("attention.sliding_window_pattern", 6)
    return {
        **_read_gemma(keys, shared),
        **_local(keys, shared, pattern[: shared["num_layers"]]),
        "rope_local_theta": keys.number("rope.freq_base_swa", 10_000.0),
        "attention_scale": _large_scale(shared, 62),
        "final_soft_cap": keys.number("final_logit_softcapping", None),
        "qk_norm": "head",
        "norm_placement": "both",
    }


def _local(
    keys: Keys,
    shared: Mapping[str, Any],
    pattern: tuple[str, ...],
    default: int | None = None,
) -> dict[str, Any]:
    window = keys.count("attention.sliding_window", default)
    if window is None or window >= shared["context_length"]:
        return {}
    return {"window": window, "layer_pattern": pattern}


def _read_phi3(keys: Keys, shared: Mapping[str, Any]) -> dict[str, Any]:
    _check_heads(keys, shared)
    return _local(keys, shared, ("local",))


# Each returns the fields that an architecture has beside the shared ones.
_READERS: Mapping[str, Callable[[Keys, Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _read_llama,
    "qwen2": _read_qwen2,
    "qwen3": lambda _keys, _shared: {"qk_norm": "head"},
    "qwen3moe": _read_qwen3moe,
    "gemma": _read_gemma,
    "gemma2": _read_gemma2,
    "gemma3": _read_gemma3,
    "phi3": _read_phi3,
}


def read_config(
    metadata: Mapping[str, Any],
    vocab_size: int,
    tied: bool,
    divisors: Mapping[str, np.ndarray],
    where: str,
) -> ModelConfig:
    """Returns the config of the model that the metadata describe.

    Args:
      vocab_size: rows of the embedding table.
      tied: True if the file has no output matrix.
      divisors: divisors of the rotary frequencies, [H / 2], by tensor name.
      where: the file, for messages.

    Raises:
      ValueError: for an unknown architecture, a missing or impossible value, and a key
        of the architecture that is not mapped.
    """
    top = Keys(metadata, where)
    arch = top.choice("general.architecture", {name: name for name in _READERS}, "")
    top.must("split.count", 0, 1)
    prefix = f"{arch}."
    own = {
        k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)
    }
    # 1e-5 is stored as the nearest f32: take the number that was meant.
    floats = {k: _shortest(v) for k, v in own.items() if isinstance(v, float)}
    keys = Keys({**own, **floats}, f"{where}: {arch}")
    try:
        config = _read(arch, keys, vocab_size, tied, divisors)
    except ValueError as error:
        known = str(error).startswith(where)
        raise ValueError(f"{'' if known else where + ': '}{error}") from None
    others = [k for k in metadata if not k.startswith((prefix, "split.", *_OTHER))]
    if others:
        raise ValueError(
            f"{where}: this jaxlm does not know the key {shown(others[0])}"
        )
    return config


def _read(
    arch: str,
    keys: Keys,
    vocab_size: int,
    tied: bool,
    divisors: Mapping[str, np.ndarray],
) -> ModelConfig:
    shared = _read_shared(keys, vocab_size, tied)
    fields = _READERS[arch](keys, shared)
    scaling = _read_scaling(keys, shared, divisors)
    if arch != "phi3" and scaling is not None and ROPE_LONG in divisors:
        raise ValueError(f"this jaxlm does not know {arch} with {ROPE_LONG}")
    keys.done()
    return ModelConfig(**{**shared, **fields}, rope_scaling=scaling)


def _write_keys(arch: str, c: ModelConfig) -> dict[str, Any]:
    """Returns the keys of an architecture, without its prefix."""
    values: dict[str, Any] = {
        "context_length": c.context_length,
        "embedding_length": c.model_dim,
        "block_count": c.num_layers,
        "feed_forward_length": c.hidden_dim,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_epsilon,
        "rope.dimension_count": c.rotary_dim,
        "rope.freq_base": c.rope_theta,
        "vocab_size": c.vocab_size,
    }
    if c.num_experts:
        values["expert_count"] = c.num_experts
        values["expert_used_count"] = c.experts_per_token
        if arch != "llama":
            values["expert_feed_forward_length"] = c.hidden_dim
    if c.window is not None and arch in ("gemma2", "gemma3"):
        # llama.cpp runs the other architectures without a window.
        values["attention.sliding_window"] = c.window
    if c.attention_soft_cap is not None:
        values["attn_logit_softcapping"] = c.attention_soft_cap
    if c.final_soft_cap is not None:
        values["final_logit_softcapping"] = c.final_soft_cap
    s = c.rope_scaling
    if s is None or s.kind == "llama3":
        return values
    values["rope.scaling.type"] = s.kind
    if s.kind != "longrope":
        values["rope.scaling.factor"] = s.factor
    if s.kind != "linear":
        length = s.original_context_length or c.context_length
        values["rope.scaling.original_context_length"] = length
    if s.kind == "longrope":
        given = s.attention_factor
        if given is None:
            given = longrope_attention_factor(c.context_length / length, length)
        values["rope.scaling.attn_factor"] = given
    return values


def rope_tensors(c: ModelConfig) -> dict[str, np.ndarray]:
    """Returns divisors of the rotary frequencies by tensor name, each [H / 2] f64."""
    s = c.rope_scaling
    if s is not None and s.kind == "llama3":
        return {ROPE_FREQS: _llama3_divisors(c.head_dim, c.rope_theta, s)}
    if s is not None and s.kind == "longrope":
        short, long = np.asarray(s.short_factors), np.asarray(s.long_factors)
        return {ROPE_LONG: long, ROPE_SHORT: short}
    return {}


def write_config(config: ModelConfig) -> tuple[str, dict[str, Any], float]:
    """Returns the architecture of llama.cpp that computes this model, and its metadata.

    The third value is the factor of the file's table of embeddings.

    Raises:
      ValueError: if there is none; names the differences from the nearest.
    """

    def attempt(arch: str) -> tuple[dict[str, Any], ModelConfig]:
        metadata: dict[str, Any] = {"general.architecture": arch}
        for key, value in _write_keys(arch, config).items():
            metadata[f"{arch}.{key}"] = value
        back = read_config(
            metadata,
            config.vocab_size,
            config.tied_embeddings,
            rope_tensors(config),
            "the metadata",
        )
        s, t = config.rope_scaling, back.rope_scaling
        if s is not None and t is not None and s.kind in ("llama3", "longrope"):
            # The divisors are those just written, exact to f32.
            back = dataclasses.replace(back, rope_scaling=s)
        return metadata, back

    attempts = {arch: partial(attempt, arch) for arch in _READERS}
    return choose(config, attempts, "architecture of llama.cpp")
