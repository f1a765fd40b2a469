"""Fields that the `config.json` files of several families have in common.

Each function takes its keys from a `Keys` and returns fields of a `ModelConfig`. Each
raises ValueError, with the file and the key, for an impossible value.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.checkpoint.keys import MAX_COUNT, MAX_LAYERS, REQUIRED, Keys
from jaxlm.config import RopeScaling
from jaxlm.terminal.printable import shown_value

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}
LAYER_KINDS = {"sliding_attention": "local", "full_attention": "global"}


def shared(
    keys: Keys,
    theta: float = 10_000.0,
    default_scaling: Mapping | None = None,
    **defaults: Any,
) -> dict[str, Any]:
    """Reads sizes, activation, epsilon, tying and RoPE by the names of Llama's config.

    Args:
      theta: default base of RoPE.
      default_scaling: keys of the RoPE scaling if the file has none.
      defaults: default values by key; other keys are required.
    """

    def count(name: str, most: int = MAX_COUNT) -> Any:
        return keys.count(name, defaults.get(name, REQUIRED), most)

    width, heads = count("hidden_size"), count("num_attention_heads")
    kv_heads = keys.count("num_key_value_heads", defaults.get("num_key_value_heads"))
    head_dim = keys.count("head_dim", defaults.get("head_dim"))
    if head_dim is None:
        if width % heads:
            raise ValueError(
                f"{keys.where}: hidden_size {width} is not a multiple of "
                f"num_attention_heads {heads}, and head_dim is missing"
            )
        head_dim = width // heads
    context = count("max_position_embeddings")
    return {
        "vocab_size": count("vocab_size"),
        "num_layers": count("num_hidden_layers", MAX_LAYERS),
        "model_dim": width,
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "hidden_dim": count("intermediate_size"),
        "context_length": context,
        "activation": keys.choice(
            "hidden_act", ACTIVATIONS, defaults.get("hidden_act", "silu")
        ),
        "norm_epsilon": keys.number("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
        "tied_embeddings": keys.flag(
            "tie_word_embeddings", defaults.get("tie_word_embeddings", False)
        ),
        **_rope(keys, context, theta, default_scaling),
    }


def _rope(
    keys: Keys, context: int, theta: float, default_scaling: Mapping | None
) -> dict[str, Any]:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""
    top_theta = keys.number("rope_theta", theta)
    top_fraction = keys.number("partial_rotary_factor", 1.0)
    original = keys.count("original_max_position_embeddings", None)
    old, new = keys.values("rope_scaling"), keys.values("rope_parameters")
    name = "rope_parameters" if new else "rope_scaling"
    rope = Keys({**old, **new} or default_scaling or {}, f"{keys.where}: {name}")
    theta = rope.number("rope_theta", top_theta)
    fraction = rope.number("partial_rotary_factor", top_fraction)
    scaling = _rope_scaling(rope, context, original)
    return {"rope_theta": theta, "rope_fraction": fraction, "rope_scaling": scaling}


def _rope_scaling(rope: Keys, context: int, original: int | None) -> RopeScaling | None:
    kinds = {k: k for k in ("linear", "dynamic", "llama3", "yarn", "longrope")}
    kinds |= {"default": None, "su": "longrope"}
    old_name = rope.take("type", "default")
    kind = rope.choice("rope_type", kinds, old_name)
    if kind is None:
        rope.must("factor", 1, 1.0)
        rope.drop("original_max_position_embeddings")
        rope.done()
        return None
    fields: dict[str, Any] = {"kind": kind}
    inside = rope.count("original_max_position_embeddings", None)
    length = original if original is not None else inside
    if kind == "linear":
        length = None  # not in the formula
    elif kind == "dynamic":
        length = context  # as in transformers, whatever the file has
    fields["original_context_length"] = length or 0
    if kind != "longrope":
        fields["factor"] = rope.number("factor")
    if kind == "llama3":
        fields["low_frequency_factor"] = rope.number("low_freq_factor")
        fields["high_frequency_factor"] = rope.number("high_freq_factor")
    if kind == "yarn":
        fields["beta_fast"] = rope.number("beta_fast", 32.0)
        fields["beta_slow"] = rope.number("beta_slow", 1.0)
        fields["truncate"] = rope.flag("truncate", True)
        rope.must("mscale")
        rope.must("mscale_all_dim")
    if kind in ("yarn", "longrope"):
        fields["attention_factor"] = rope.number("attention_factor", None)
    if kind == "longrope":
        fields["short_factors"] = tuple(map(float, rope.items("short_factor", float)))
        fields["long_factors"] = tuple(map(float, rope.items("long_factor", float)))
        if length is None:
            raise ValueError(
                f"{rope.where}: longrope needs original_max_position_embeddings"
            )
        # The factor is the ratio of the lengths, unless it is given.
        factor = rope.number("factor", None)
        if factor is not None and not math.isclose(factor, context / length):
            raise ValueError(
                f"{rope.where}: factor is {factor}, but the lengths give "
                f"{context / length}: this jaxlm computes only the latter"
            )
    rope.done()
    return RopeScaling(**fields)


def soft_cap(keys: Keys, name: str, default: float | None) -> float | None:
    """Reads a soft cap; the default is for an absent key, and null means none."""
    return keys.number(name, None if name in keys else default)


def period(values: list[Any]) -> tuple[Any, ...]:
    """Returns the shortest pattern whose repetition gives the values."""
    for n in range(1, len(values) + 1):
        if all(v == values[i % n] for i, v in enumerate(values)):
            return tuple(values[:n])
    raise AssertionError("no values")


def windows(
    keys: Keys,
    fields: Mapping[str, Any],
    default: int | None = None,
    is_local: Callable[[int], bool] = lambda _: True,
    used: bool = True,
) -> dict[str, Any]:
    """Reads `sliding_window` and `layer_types` as `window` and `layer_pattern`.

    Args:
      fields: the result of `shared`.
      default: the window in tokens of a file without this key; null means no window.
      is_local: whether a layer uses the window, in a file without `layer_types`.
      used: False makes all layers global.
    """
    window = keys.count("sliding_window", None if "sliding_window" in keys else default)
    layers = fields["num_layers"]
    otherwise = [
        "sliding_attention" if is_local(i) else "full_attention" for i in range(layers)
    ]
    names = keys.items("layer_types", str, otherwise)
    if len(names) < layers:
        raise ValueError(
            f"{keys.where}: layer_types has {len(names)} entries for {layers} layers"
        )
    for name in set(names) - set(LAYER_KINDS):
        raise ValueError(
            f"{keys.where}: layer_types has {shown_value(name)}, which this "
            "jaxlm cannot compute"
        )
    kinds = [LAYER_KINDS[name] for name in names[:layers]]
    reached = window is not None and window < fields["context_length"]
    if not (used and reached and "local" in kinds):
        return {"layer_pattern": ("global",), "window": None}
    return {"layer_pattern": period(kinds), "window": window}


def attention_biases(keys: Keys) -> dict[str, Any]:
    """Reads `attention_bias`, which includes the output projection."""
    bias = keys.flag("attention_bias", False)
    return {"attention_bias": bias, "attention_output_bias": bias}
