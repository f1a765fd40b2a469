"""The Jacobian lens: what the model is disposed to say from each layer.

It moves a value of an earlier layer to the end, by the average derivative of the last
layer by it, and so reads layers that the logit lens cannot.
"""

import hashlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from jaxlm import tree
from jaxlm.checkpoint.hf.safetensors_file import read_safetensors, write_safetensors
from jaxlm.config import ModelConfig
from jaxlm.model.transformer import forward
from jaxlm.ops.linear import compute_dtype
from jaxlm.ops.probing.edit import Edit
from jaxlm.ops.probing.tap import Tap
from jaxlm.types import Params

# The name of the tensor, and that of the metadata that says of which weights it is.
_TENSOR, _WEIGHTS = "jacobian", "weights"
_MARK_VALUES = 256


def jacobian_lens(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    skip: int = 16,
    batch_size: int = 16,
) -> Float[Array, "L D D"]:
    """Returns the mean Jacobian of the last layer's stream by each layer's, f32.

    `J_l = mean over p of sum over q >= p of d resid_post[L-1, q] / d resid_post[l, p]`,
    over the positions from `skip` on and over the rows, from D backward passes through
    one forward pass. `J_l x` is then what a value x of layer l contributes to the end:
    give `transported(J, stream)` to `logit_lens`. `fit_jacobian_lens` averages
    it over texts; rows of one call share their memory. Source: Gurnee et al. 2026,
    "Verbalizable representations form a global workspace in language models".

    Args:
      skip: first tokens, whose attention and values are unlike the others'.
      batch_size: backward passes at once: a bound on memory.
    """
    shape = (config.num_layers, *tokens.shape, config.model_dim)
    last = Tap("resid_post", (config.num_layers - 1,))

    def end(change: Array) -> Array:
        edits = (Edit("resid_post", "add", change),)
        out = forward(config, params, tokens, taps=(last,), edits=edits, head=False)
        return jnp.sum(out.trace["resid_post"][0, :, skip:].astype(jnp.float32), (0, 1))

    _, backward = jax.vjp(end, jnp.zeros(shape, compute_dtype(config.dtype)))

    def row(direction: Float[Array, " D"]) -> Float[Array, "L D"]:
        (gradient,) = backward(direction)
        return jnp.mean(gradient[:, :, skip:].astype(jnp.float32), axis=(1, 2))

    rows = jax.lax.map(row, jnp.eye(config.model_dim), batch_size=batch_size)
    return rows.swapaxes(0, 1)


def transported(
    jacobian: Float[Array, "L D D"], stream: Float[Array, "L B T D"]
) -> Float[Array, "L B T D"]:
    """Returns `J_l x` of each value of `resid_post`, f32."""
    return jnp.einsum("LED,LBTD->LBTE", jacobian, stream.astype(jnp.float32))


def fit_jacobian_lens(
    config: ModelConfig,
    params: Params,
    rows: Integer[np.ndarray, "R T"],
    *,
    skip: int = 16,
) -> Float[np.ndarray, "L D D"]:
    """Returns the mean of `jacobian_lens` over rows, one at a time, on the host."""
    run = jax.jit(partial(jacobian_lens, config, skip=skip))
    total = np.zeros((config.num_layers, *(config.model_dim,) * 2), np.float32)
    for row in rows:
        total += np.asarray(run(params, jnp.asarray(row, jnp.int32)[None]))
    return total / len(rows)


def write_jacobian_lens(
    path: Path, jacobian: Float[np.ndarray, "L D D"], params: Params
) -> None:
    """Writes a lens as a .safetensors file, with a mark of the weights."""
    specs = {_TENSOR: (jacobian.shape, np.dtype(np.float32))}
    write_safetensors(path, specs, lambda _: jacobian, {_WEIGHTS: _mark(params)})


def _mark(params: Params) -> str:
    """Returns a SHA-256 (hex) over some numbers of each weight; training changes it."""
    digest = hashlib.sha256()
    for name, leaf in tree.flatten(params).items():
        some = np.asarray(leaf[(0,) * (leaf.ndim - 1)][:_MARK_VALUES])
        digest.update(f"{name} {some.dtype}".encode() + some.tobytes())
    return digest.hexdigest()


def read_jacobian_lens(
    config: ModelConfig, path: Path, params: Params | None = None
) -> Float[np.ndarray, "L D D"]:
    """Reads what `write_jacobian_lens` wrote.

    Args:
      params: the weights of which it must be; None takes those of any.

    Raises:
      ValueError: if it is no such file, or of a model of another shape or with other
        weights. Files of earlier versions do not tell their weights.
    """
    tensors, metadata = read_safetensors(path)
    if set(tensors) != {_TENSOR}:
        raise ValueError(f"{path} is no Jacobian lens: it has no tensor {_TENSOR!r}")
    jacobian = np.asarray(tensors[_TENSOR].read(), np.float32)
    wanted = (config.num_layers, config.model_dim, config.model_dim)
    if jacobian.shape != wanted:
        raise ValueError(
            f"{path} is a lens of another model: its shape is {jacobian.shape}, and "
            f"this model's would be {wanted}"
        )
    of = metadata.get(_WEIGHTS)
    if params is not None and of is not None and of != _mark(params):
        raise ValueError(
            f"{path} is a lens of another model, or of an earlier step: make one of "
            "these weights (--lens-text)"
        )
    return jacobian
