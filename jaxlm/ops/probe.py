"""Named places in the forward pass where values can be read.

The model calls `probe(site, x)` and goes on with what comes back. Nothing tapped,
nothing recorded: the call returns `x` itself, so that the compiled program is the
same as without it. Edits, which return another value, belong here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jaxtyping import Array

from jaxlm.config import nearest

# Site -> (shape of one layer's value, what it is). Shapes in the letters of types.py.
# Sites marked * lie outside the layers.
SITES: dict[str, tuple[str, str]] = {
    "tokens": ("B T", "* token ids"),
    "embed": ("B T D", "* embeddings, scaled, with learned or sinusoidal positions"),
    "resid_pre": ("B T D", "residual stream that enters the block"),
    "attn_norm_scale": ("B T 1", "inverse RMS or deviation of the norm before it"),
    "attn_in": ("B T D", "input of the attention projections, after its norm"),
    "q": ("B T N H", "queries after bias and qk-norm, before rotation"),
    "k": ("B T K H", "keys after bias and qk-norm, before rotation"),
    "v": ("B T K H", "values"),
    "q_rot": ("B T N H", "queries as the scores see them"),
    "k_rot": ("B T K H", "keys as the scores see them"),
    "attn_scores": ("B N T S", "scores after scale and soft cap, -1e30 where masked"),
    "attn_lse": ("B N T", "log-sum-exp of the scores, the sink included"),
    "attn_probs": ("B N T S", "attention probabilities; with a sink rows sum below 1"),
    "z": ("B T N H", "weighted values of each head"),
    "head_out": ("B T N D", "each head's part of attn_out, without the bias"),
    "attn_out": ("B T D", "output projection of attention, before any output norm"),
    "attn_out_post": ("B T D", "what attention adds to the residual stream"),
    "resid_mid": ("B T D", "residual stream between attention and feed-forward"),
    "mlp_norm_scale": ("B T 1", "inverse RMS or deviation of the norm before it"),
    "mlp_in": ("B T D", "input of the feed-forward, after its norm"),
    "router_logits": ("B T E", "logits of the experts, f32, after the bias"),
    "mlp_pre": ("B T F", "argument of the non-linearity"),
    "mlp_gate": ("B T F", "second projection of a gated feed-forward"),
    "mlp_act": ("B T F", "input of the down projection"),
    "mlp_out": ("B T D", "output of the feed-forward, before any output norm"),
    "mlp_out_post": ("B T D", "what the feed-forward adds to the residual stream"),
    "resid_post": ("B T D", "residual stream that leaves the block"),
    "final_norm": ("B T D", "* input of the output head"),
    "logits": ("B T V", "* logits after the final soft cap"),
}


@dataclass(frozen=True)
class Tap:
    """A site to read. Static: part of what a compiled program is keyed by."""

    site: str
    """A name in `SITES`."""
    layers: tuple[int, ...] | None = None
    """Layers to read, counted from 0; None reads all."""


def check_taps(taps: Sequence[Tap], num_layers: int, absent: frozenset[str]) -> None:
    """Checks a selection.

    Args:
      absent: sites that this model does not have.

    Raises:
      ValueError: for an unknown, absent or doubled site, or a layer out of range.
    """
    seen = set()
    for tap in taps:
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
        if SITES[tap.site][1].startswith("*"):
            raise ValueError(f"site {tap.site!r} lies outside the layers: no layers=")
        if not tap.layers or len(set(tap.layers)) != len(tap.layers):
            raise ValueError(
                f"tap of {tap.site!r}: layers {tap.layers} are empty or doubled"
            )
        for layer in tap.layers:
            if not 0 <= layer < num_layers:
                raise ValueError(
                    f"tap of {tap.site!r}: layer {layer} is not among 0 to "
                    f"{num_layers - 1}"
                )


class Probe:
    """Records the tapped sites of one place in the model while it is traced."""

    def __init__(self, taps: Sequence[Tap] = ()):
        self._sites = frozenset(tap.site for tap in taps)
        self.values: dict[str, Array] = {}

    def wants(self, *sites: str) -> bool:
        """Whether any of the sites is tapped: ask before computing a value for it."""
        return any(site in self._sites for site in sites)

    def __call__(self, site: str, x: Array) -> Array:
        assert site in SITES, site
        if site in self._sites:
            self.values[site] = x
        return x


jax.tree_util.register_static(Tap)
