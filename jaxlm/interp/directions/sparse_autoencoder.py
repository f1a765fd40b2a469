"""Published sparse autoencoders and transcoders: a layer's value as a few features.

An autoencoder stands in for its site by an edit, and its features are read from a tap:

    edit = Edit(site, "call", Partial(SparseAutoencoder.__call__, sae), layer=layer)
    features = sae.encode(trace[site])

A transcoder reads `mlp_in` and writes `mlp_out` of the same layer, in place of the
feed-forward: the same edit of `mlp_out`, with `reads="mlp_in"`. Sources: Cunningham et
al. 2023, arXiv:2309.08600; Rajamanoharan et al. 2024, arXiv:2404.16014 (gated) and
arXiv:2407.14435 (JumpReLU); Gao et al. 2024, arXiv:2406.04093 (top-k); Dunefsky et al.
2024, arXiv:2406.11944.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.checkpoint.hf.safetensors_file import read_safetensors
from jaxlm.files.strict_json import parse_object

_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
# Names of sae_lens: the activation, and whether it needs thresholds.
_ARCHITECTURES = {
    "standard": "relu",
    "transcoder": "relu",
    "jumprelu": "jumprelu",
    "jumprelu_transcoder": "jumprelu",
    "topk": "topk",
    "gated": "gated",
}
# What each has besides the weights that all have.
_MORE_WEIGHTS = {
    "jumprelu": {"threshold"},
    "gated": {"b_gate", "b_mag", "r_mag"},
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseAutoencoder:
    """Weights f32; an input has D numbers, M features are few of them above 0."""

    # `Any`: see `jaxlm/types.py` on leaves.
    encoder: Any
    """[D, M]."""
    encoder_bias: Any
    """[M]."""
    decoder: Any
    """[M, D]: the direction that each feature writes."""
    decoder_bias: Any
    """[D]."""
    thresholds: Any = None
    """[M], for `jumprelu`: below them a feature is 0. For `gated` minus the bias of the
    gate: what `x @ encoder` must exceed."""
    magnitudes: Any = None
    """[M], for `gated`: what `x @ encoder` is multiplied with before the bias is added,
    for the size of a feature whose gate is open."""
    activation: str = field(default="relu", metadata={"static": True})
    """`relu`, `jumprelu`, `topk` or `gated`."""
    count: int | None = field(default=None, metadata={"static": True})
    """For `topk`: how many features are kept."""
    subtracts_bias: bool = field(default=False, metadata={"static": True})
    """Whether the decoder's bias is subtracted from the input first."""

    def encode(self, x: Float[Array, "*B D"]) -> Float[Array, "*B M"]:
        """Returns the features, f32."""
        x = x.astype(jnp.float32)
        if self.subtracts_bias:
            x = x - self.decoder_bias
        pre = x @ self.encoder
        if self.activation == "gated":
            size = jax.nn.relu(pre * self.magnitudes + self.encoder_bias)
            return jnp.where(pre > self.thresholds, size, 0.0)
        pre = pre + self.encoder_bias
        features = jax.nn.relu(pre)
        if self.activation == "jumprelu":
            return jnp.where(pre > self.thresholds, features, 0.0)
        if self.activation == "topk":
            assert self.count is not None
            least = jax.lax.top_k(pre, self.count)[0][..., -1:]
            return jnp.where(pre >= least, features, 0.0)
        return features

    def decode(self, features: Float[Array, "*B M"]) -> Float[Array, "*B D"]:
        """Returns the value that the features stand for, f32."""
        return features @ self.decoder + self.decoder_bias

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns the reconstruction of x, or a transcoder's output, f32."""
        return self.decode(self.encode(x))


def load_sparse_autoencoder(path: Path | str) -> SparseAutoencoder:
    """Reads a folder as sae_lens writes it, or a file of Gemma Scope.

    A folder has `cfg.json` and `sae_weights.safetensors`; Gemma Scope has
    `params.npz`, or a safetensors file, of a JumpReLU autoencoder or transcoder.

    Raises:
      ValueError: for a file that is none of these, or an architecture that this is not.
    """
    path = Path(path)
    if path.is_dir():
        text = (path / "cfg.json").read_bytes()
        config = _current_config(parse_object(text, str(path / "cfg.json")))
        return _from_weights(_read(path / "sae_weights.safetensors"), config, path)
    weights = _read(path)
    config = {"architecture": "jumprelu" if "threshold" in weights else "standard"}
    return _from_weights(weights, config, path)


def _current_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config as sae_lens 6 writes it, also of one that is older."""
    config = {"apply_b_dec_to_input": True, **config}
    activation = config.get("activation_fn_str", config.get("activation_fn"))
    more = config.get("activation_fn_kwargs")
    if activation == "topk" and isinstance(more, dict) and "k" in more:
        config |= {"architecture": "topk", "k": more["k"]}
    return config


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            weights = dict(file)
    else:
        weights = {name: x.read() for name, x in read_safetensors(path)[0].items()}
    # Older files have a factor of each feature, which is 1 unless it was trained.
    if np.all(weights.get("scaling_factor", 0) == 1):
        del weights["scaling_factor"]
    # Gemma Scope 2 writes w_enc.
    names = {name.lower(): name for name in _WEIGHTS}
    return {names.get(name.lower(), name): x for name, x in weights.items()}


def _from_weights(
    weights: dict[str, np.ndarray], config: dict[str, Any], path: Path
) -> SparseAutoencoder:
    name = config.get("architecture", "standard")
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture {name!r}; {', '.join(_ARCHITECTURES)} can be read"
        )
    if config.get("normalize_activations") not in ("none", None, False):
        raise ValueError(
            f"{path}: normalize_activations {config['normalize_activations']!r}: fold "
            "the factor into the weights first"
        )
    activation = _ARCHITECTURES[name]
    wanted = {*_WEIGHTS, *_MORE_WEIGHTS.get(activation, ())}
    if activation == "gated":
        wanted -= {"b_enc"}  # the gate and the size have a bias each
    if set(weights) != wanted:
        wrong = ", ".join(sorted(set(weights) ^ wanted))
        raise ValueError(f"{path}: tensors missing or unknown: {wrong}")
    M = weights["W_enc"].shape[-1]
    wrong_shape = (
        weights["W_enc"].ndim != 2
        or weights["W_dec"].shape != (M, *weights["b_dec"].shape)
        or any(
            weights[name].shape != (M,) for name in wanted - {"W_enc", "W_dec", "b_dec"}
        )
    )
    if wrong_shape:
        shapes = {name: x.shape for name, x in weights.items()}
        raise ValueError(f"{path}: shapes do not belong together: {shapes}")
    count = config.get("k") if activation == "topk" else None
    if activation == "topk" and not (isinstance(count, int) and 0 < count <= M):
        raise ValueError(f"{path}: k is {count!r}: it must be from 1 to {M}")
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in weights.items()}
    if activation == "topk" and config.get("rescale_acts_by_decoder_norm"):
        # Features are as large as what they write, and so chosen.
        lengths = jnp.linalg.norm(arrays["W_dec"], axis=-1)
        arrays["W_enc"], arrays["b_enc"] = (
            arrays[name] * lengths for name in ("W_enc", "b_enc")
        )
        arrays["W_dec"] /= lengths[:, None]
    thresholds, magnitudes = arrays.get("threshold"), None
    if activation == "gated":
        arrays["b_enc"], magnitudes = arrays["b_mag"], jnp.exp(arrays["r_mag"])
        thresholds = -arrays["b_gate"]
    return SparseAutoencoder(
        *(arrays[name] for name in _WEIGHTS),
        thresholds=thresholds,
        magnitudes=magnitudes,
        activation=activation,
        count=count,
        subtracts_bias=bool(config.get("apply_b_dec_to_input")),
    )
