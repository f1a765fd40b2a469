"""Named sites of the forward pass, and how their values are read.

The model calls `probe(site, x)` and continues with the result. When nothing is tapped
that is `x` itself, so the compiled program is the same as without the call. A `Probe`
collects the tapped sites of one layer; a `Recorder` keeps them, in one slot per tapped
layer. Derived sites are computed after the pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxlm.fields import nearest
from jaxlm.ops.layout import layout


@dataclass(frozen=True)
class Site:
    """A named value of the forward pass."""

    shape: str
    """Shape of one layer's value, in the letters of `types.py`."""
    description: str
    outside_layers: bool = False
    """Whether it lies outside the layers."""
    derived: bool = False
    """Whether it is computed from other sites after the pass."""
    float32: bool = False
    """Whether a recorded site is float32; others have the compute dtype."""


SITES: dict[str, Site] = {
    "tokens": Site("B T", "token ids, int32", outside_layers=True),
    "embed": Site("B T D", "token embeddings, scaled", outside_layers=True),
    "pos_embed": Site("B T D", "learned or sinusoidal positions", outside_layers=True),
    "resid_pre": Site("B T D", "residual stream that enters the block"),
    "attn_norm_div": Site("B T 1", "divisor of the norm of attention", derived=True),
    "attn_in": Site("B T D", "input of the attention projections"),
    "q": Site("B T N H", "queries, with bias, before qk-norm and rotation"),
    "k": Site("B T K H", "keys, with bias, before qk-norm and rotation"),
    "v": Site("B T K H", "values"),
    "q_normed": Site("B T N H", "queries after qk-norm, before rotation"),
    "k_normed": Site("B T K H", "keys after qk-norm, before rotation"),
    "q_rot": Site("B T N H", "queries as the scores see them"),
    "k_rot": Site("B T K H", "keys as the scores and the cache see them"),
    "attn_scores": Site("B N T S", "scores, -1e30 where masked", derived=True),
    "attn_lse": Site("B N T", "log-sum-exp of the scores, sink included", float32=True),
    "attn_probs": Site("B N T S", "exp(scores - lse)", derived=True),
    "z": Site("B T N H", "probability-weighted values of each head"),
    "head_out": Site(
        "B T N D", "each head's part of attn_out, without its bias", derived=True
    ),
    "attn_out": Site("B T D", "output projection of attention, before an output norm"),
    "attn_out_post": Site("B T D", "what attention adds to the residual stream"),
    "resid_mid": Site("B T D", "residual stream between attention and feed-forward"),
    "mlp_norm_div": Site("B T 1", "divisor of the feed-forward's norm", derived=True),
    "mlp_in": Site("B T D", "input of the feed-forward"),
    "router_logits": Site("B T E", "logits of the experts, with bias", float32=True),
    "expert_ids": Site("B T k", "experts of each token, best first", derived=True),
    "expert_weights": Site("B T k", "weights of these experts", derived=True),
    "mlp_pre": Site("B T F", "argument of the non-linearity"),
    "mlp_up": Site("B T F", "what the activation is multiplied by, when gated"),
    "mlp_act": Site("B T F", "input of the down projection"),
    "mlp_out": Site("B T D", "output of the feed-forward, before an output norm"),
    "mlp_out_post": Site("B T D", "what the feed-forward adds to the residual stream"),
    "resid_post": Site("B T D", "residual stream that leaves the block"),
    "final_norm_div": Site(
        "B T 1", "divisor of the last norm", outside_layers=True, derived=True
    ),
    "final_norm": Site("B T D", "input of the output head", outside_layers=True),
    "logits": Site("B T V", "logits, after the final soft cap", outside_layers=True),
}


@jax.tree_util.register_static
@dataclass(frozen=True)
class Tap:
    """A site to read. Static: other taps compile another program."""

    site: str
    """A name in `SITES`."""
    layers: tuple[int, ...] | None = None
    """Layers to read, counted from 0; None reads all."""


def check_taps(taps: Sequence[Tap], num_layers: int, absent: frozenset[str]) -> None:
    """Checks a selection.

    Args:
      absent: sites that this model does not have.

    Raises:
      ValueError: for what is no tap, an unknown, absent or duplicate site, or a layer
        out of range.
    """
    if isinstance(taps, str | Tap):
        raise ValueError(f"taps is {taps!r}: give a tuple of taps, (Tap(...),)")
    seen = set()
    for tap in taps:
        if not isinstance(tap, Tap):
            raise ValueError(f"taps has {tap!r}, which is no Tap: give Tap({tap!r})")
        if tap.site not in SITES or tap.site in absent:
            valid = [site for site in SITES if site not in absent]
            raise ValueError(
                f"no site {tap.site!r} in this model{nearest(tap.site, valid)}; "
                f"sites: {', '.join(valid)}"
            )
        if tap.site in seen:
            raise ValueError(f"site {tap.site!r} is tapped twice: join its layers")
        seen.add(tap.site)
        if tap.layers is None:
            continue
        if SITES[tap.site].outside_layers:
            raise ValueError(f"site {tap.site!r} lies outside the layers: no layers=")
        if not isinstance(tap.layers, tuple):
            raise ValueError(
                f"tap of {tap.site!r}: layers is {tap.layers!r}: give a tuple, such as "
                "(0, 1)"
            )
        if not tap.layers or len(set(tap.layers)) != len(tap.layers):
            raise ValueError(
                f"tap of {tap.site!r}: layers {tap.layers} are empty or have duplicates"
            )
        for layer in tap.layers:
            if not 0 <= layer < num_layers:
                raise ValueError(
                    f"tap of {tap.site!r}: layer {layer} is not among 0 to "
                    f"{num_layers - 1}"
                )


class Probe:
    """Collects tapped sites of one part of the model while it is traced."""

    def __init__(self, taps: Sequence[Tap] = ()):
        self._sites = frozenset(tap.site for tap in taps)
        self.values: dict[str, Array] = {}

    def __contains__(self, site: str) -> bool:
        return site in self._sites

    def __call__(self, site: str, x: Array) -> Array:
        assert site in SITES and not SITES[site].derived, site
        if site in self._sites:
            self.values[site] = x
        return x


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recorder:
    """Recorded values of all layers, each in its slot; carried from layer to layer.

    A spare slot absorbs writes of untapped layers, since the layer number is traced in
    a scan.
    """

    taps: tuple[Tap, ...] = field(metadata={"static": True})
    num_layers: int = field(metadata={"static": True})
    # `Any`: see `jaxlm/types.py` on leaves.
    slots: Mapping[str, Any]
    """Site -> [slots, *shape of the site]."""

    @classmethod
    def empty(
        cls,
        taps: Sequence[Tap],
        num_layers: int,
        sizes: Mapping[str, int],
        dtype: Any,
        partition: Callable[[str], P | None],
    ) -> "Recorder":
        """Returns a recorder whose slots are zeros.

        Args:
          taps: recorded sites inside the layers.
          sizes: size of each letter in their shapes.
          dtype: the compute dtype.
          partition: maps letters to a partition in the current mesh, or None.
        """

        def zeros(tap: Tap) -> Array:
            letters = SITES[tap.site].shape.split()
            chosen = num_layers if tap.layers is None else len(tap.layers) + 1
            shape = (chosen, *(sizes[letter] for letter in letters))
            out = partition("L" + "".join(letters))
            slot_dtype = jnp.float32 if SITES[tap.site].float32 else dtype
            return jnp.zeros(shape, slot_dtype, out_sharding=out)

        return cls(tuple(taps), num_layers, {tap.site: zeros(tap) for tap in taps})

    def write(self, layer: Any, values: Mapping[str, Array]) -> "Recorder":
        """Returns a recorder with one layer's values written; `layer` may be traced."""
        slots = dict(self.slots)
        for tap in self.taps:
            layers = tap.layers or range(self.num_layers)
            if isinstance(layer, int) and layer not in layers:
                continue
            old, new = slots[tap.site], values[tap.site]
            assert (new.shape, new.dtype) == (old.shape[1:], old.dtype), tap.site
            placed = layout(old)
            if placed is not None:
                new = jax.sharding.reshard(new, P(*placed.spec[1:]))
            slot = self._slots_of(tap)[layer]
            slots[tap.site] = jax.lax.dynamic_update_index_in_dim(old, new, slot, 0)
        return Recorder(self.taps, self.num_layers, slots)

    def read(self) -> dict[str, Array]:
        """Returns site -> [layers of its tap, *shape], in the order of the tap."""
        return {
            tap.site: self.slots[tap.site]
            if tap.layers is None
            else self.slots[tap.site][: len(tap.layers)]
            for tap in self.taps
        }

    def _slots_of(self, tap: Tap) -> Array:
        """Returns the slot of each layer."""
        layers = range(self.num_layers) if tap.layers is None else tap.layers
        slots = np.full(self.num_layers, len(layers))
        slots[list(layers)] = np.arange(len(layers))
        return jnp.asarray(slots)
