"""Random parameters, drawn from the table in `params.py`."""

import flax.linen as nn
import jax
from jaxtyping import Array, Key

from jaxlm.config import ModelConfig
from jaxlm.model.block import Block
from jaxlm.model.checks import check_block, check_config, check_key
from jaxlm.model.params import param, weights
from jaxlm.types import Params


def init(
    config: ModelConfig, key: Key[Array, ""], *, block: type[Block] = Block
) -> Params:
    """Makes random parameters, f32, stacked over layers. Jit it to shard them.

    Args:
      key: a typed PRNG key.
      block: what computes a layer; see `Block`.

    Raises:
      ValueError: when the vocabulary size is not set, and for arguments of another
        type.
    """
    check_config(config)
    check_block(block, Block)
    check_key(key)
    if not config.vocab_size:
        raise ValueError("model.vocab_size is 0: set it to the tokenizer's size")
    return _Parameters(config, "", block, parent=None).init(key)["params"]


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
