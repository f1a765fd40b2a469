"""What a model starts from: random parameters, and an empty key/value cache."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxlm.config import CacheKind, ModelConfig
from jaxlm.model.block import Block, layer_kinds
from jaxlm.model.checks import check_block, check_config, check_key
from jaxlm.model.divisible import divisible_config
from jaxlm.model.kv_cache import SPARE, Cache, LayerCache, LayerStacks
from jaxlm.model.params import param, weights
from jaxlm.ops.linear import compute_dtype
from jaxlm.sharding.rules import activation_spec
from jaxlm.types import Params


def init(
    config: ModelConfig, key: Key[Array, ""], *, block: type[Block] = Block
) -> Params:
    """Draws parameters as the table in `params.py` says, f32, stacked over layers.

    Jit it to shard them.

    Args:
      key: a typed PRNG key.
      block: what computes a layer; see `Block`.

    Raises:
      ValueError: when the vocabulary size is not set, and for arguments of another
        type.
    """
    check_config(config)
    check_block(block)
    check_key(key)
    if not config.vocab_size:
        raise ValueError("model.vocab_size is 0: set it to the tokenizer's size")
    return _Parameters(config, "", block, parent=None).init(key)["params"]


def init_cache(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    dtype: Any = None,
    kind: CacheKind = "full",
    spare: int = 0,
) -> Cache:
    """Makes an empty cache, stacked over layers: [L, B, max_length, K, H].

    K is larger than `num_kv_heads` where mesh.tensor is.

    Args:
      dtype: of keys and values that are not quantized; None takes the compute dtype.
      kind: `ring`: local layers have room for their window and `SPARE` tokens only, if
        that is less; `int8`, `int4`: keys and values are quantized; `ring_int8`,
        `ring_int4`: both.
      spare: room beyond `max_length`, for tokens that are taken back; rings have
        their own.

    Raises:
      ValueError: when `max_length` is more than the model's context, and for `int4`
        with an odd `head_dim`.
    """
    check_config(config)
    if max_length > config.context_length:
        raise ValueError(
            f"a cache of {max_length} tokens is longer than model.context_length "
            f"{config.context_length}"
        )
    head_dim = config.head_dim
    dtype = compute_dtype(config.dtype) if dtype is None else jnp.dtype(dtype)
    is_quantized = kind.endswith(("int8", "int4"))
    if kind.endswith("int8"):
        dtype = jnp.int8
    elif kind.endswith("int4"):
        if head_dim % 2:
            raise ValueError(f"int4 packs two values: model.head_dim {head_dim} is odd")
        dtype, head_dim = jnp.uint8, head_dim // 2
    heads = (divisible_config(config).num_kv_heads, head_dim)

    def stack(num_layers: int, window: int | None) -> LayerCache:
        size = max_length + spare if window is None else window + SPARE
        shape = (num_layers, batch_size, size, *heads)

        def zeros(letters: str, dtype: Any) -> Array:
            partition = activation_spec(letters)
            return jnp.zeros(shape[: len(letters)], dtype, out_sharding=partition)

        keys, values = (zeros("LBSKH", dtype) for _ in "kv")
        if not is_quantized:
            return LayerCache(keys, values, window=window)
        key_scale, value_scale = (zeros("LBSK", jnp.float32) for _ in "kv")
        return LayerCache(keys, values, key_scale, value_scale, window)

    lengths = jnp.zeros(batch_size, jnp.int32, out_sharding=activation_spec("B"))
    windows: list[int | None] = [None]
    if kind.startswith("ring") and config.window is not None:
        fits = config.window + SPARE < max_length
        kinds = layer_kinds(config)
        windows = [config.window if k.local and fits else None for k in kinds]
    if len(set(windows)) == 1:
        return Cache(stack(config.num_layers, windows[0]), lengths)
    depth, period = config.num_layers, len(windows)
    stacks = [stack(len(range(i, depth, period)), w) for i, w in enumerate(windows)]
    return Cache(LayerStacks(tuple(stacks)), lengths)


class _Parameters(nn.Module):
    """Declares the weights below a folder of the tree, in the order of the table."""

    config: ModelConfig
    folder: str
    block: type[Block]

    @nn.compact
    def __call__(self):
        inside = [p for p in weights(self.config) if p.startswith(self.folder)]
        names = dict.fromkeys(p[len(self.folder) :].partition("/")[0] for p in inside)
        for name in names:
            path = self.folder + name
            if path in inside:
                param(self, path)
            elif path == "layers":
                self.param(name, _init_layers, self.config, self.block)
            else:
                _Parameters(self.config, f"{path}/", self.block, name=name)()


def _init_layers(
    key: Key[Array, ""], config: ModelConfig, block: type[Block]
) -> Params:
    """Makes all layers, stacked [L, ...]; layers of all kinds have the same shapes."""

    def one_layer(key) -> Params:
        if block is not Block:
            return block.init_layer(config, key)
        return _Parameters(config, "layers/", block, parent=None).init(key)["params"]

    return jax.vmap(one_layer)(jax.random.split(key, config.num_layers))
