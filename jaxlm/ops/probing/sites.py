"""The table of named values of the forward pass: their shapes and what they are."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxlm.fields import nearest


@dataclass(frozen=True)
class Site:
    """A named value of the forward pass."""

    shape: str
    """Shape of one layer's value, in the letters of `types.py`."""
    description: str
    outside_layers: bool = False
    """Whether it lies outside the layers."""
    derived: bool = False
    """Whether it is computed from other sites after the pass, unless it is edited."""
    edit_instead: str | None = None
    """The site to edit in its place, for a derived site that cannot be edited."""
    float32: bool = False
    """Whether its value is float32; others have the compute dtype."""

    def axis(self, letters: str) -> int | None:
        """Returns the axis of one layer's value that has one of these letters."""
        axes = [i for i, c in enumerate(self.shape.split()) if c in letters]
        return axes[0] if axes else None


def _divisor(description: str, outside_layers: bool = False) -> Site:
    return Site("B T 1", description, outside_layers, derived=True, float32=True)


SITES: dict[str, Site] = {
    "tokens": Site("B T", "token ids, int32", outside_layers=True),
    "embed": Site("B T D", "token embeddings, scaled", outside_layers=True),
    "pos_embed": Site("B T D", "learned or sinusoidal positions", outside_layers=True),
    "resid_pre": Site("B T D", "residual stream that enters the block"),
    "attn_norm_div": _divisor("divisor of the norm of attention"),
    "attn_in": Site("B T D", "input of the attention projections"),
    "q": Site("B T N H", "queries, with bias, before qk-norm and rotation"),
    "k": Site("B T K H", "keys, with bias, before qk-norm and rotation"),
    "v": Site("B T K H", "values"),
    "q_normed": Site("B T N H", "queries after qk-norm, before rotation"),
    "k_normed": Site("B T K H", "keys after qk-norm, before rotation"),
    "q_rot": Site("B T N H", "queries as the scores see them"),
    "k_rot": Site("B T K H", "keys as the scores and the cache see them"),
    "attn_scores": Site(
        "B N T S", "scores, -1e30 where masked", derived=True, float32=True
    ),
    "attn_lse": Site("B N T", "log-sum-exp of the scores, sink included", float32=True),
    "attn_probs": Site("B N T S", "exp(scores - lse)", derived=True, float32=True),
    "z": Site("B T N H", "probability-weighted values of each head"),
    "head_out": Site(
        "B T N D",
        "each head's part of attn_out, without its bias",
        derived=True,
        edit_instead="z",
    ),
    "attn_out": Site("B T D", "output projection of attention, before an output norm"),
    "attn_out_post": Site("B T D", "what attention adds to the residual stream"),
    "resid_mid": Site("B T D", "residual stream between attention and feed-forward"),
    "mlp_norm_div": _divisor("divisor of the feed-forward's norm"),
    "mlp_in": Site("B T D", "input of the feed-forward"),
    "router_logits": Site("B T E", "logits of the experts, with bias", float32=True),
    "expert_ids": Site(
        "B T k",
        "experts of each token, best first",
        derived=True,
        edit_instead="router_logits",
    ),
    "expert_weights": Site(
        "B T k",
        "weights of these experts",
        derived=True,
        edit_instead="router_logits",
        float32=True,
    ),
    "mlp_pre": Site("B T F", "argument of the non-linearity"),
    "mlp_up": Site("B T F", "what the activation is multiplied by, when gated"),
    "mlp_act": Site("B T F", "input of the down projection"),
    "mlp_out": Site("B T D", "output of the feed-forward, before an output norm"),
    "mlp_out_post": Site("B T D", "what the feed-forward adds to the residual stream"),
    "resid_post": Site("B T D", "residual stream that leaves the block"),
    "final_norm_div": _divisor("divisor of the last norm", outside_layers=True),
    "final_norm": Site("B T D", "input of the output head", outside_layers=True),
    "logits": Site("B T V", "logits, after the final soft cap", outside_layers=True),
}

# Computed aside by the fast implementations; an edit of one selects the reference.
ATTENTION_SITES = frozenset({"attn_scores", "attn_lse", "attn_probs"})


def computed_aside(edited: frozenset[str]) -> frozenset[str]:
    """Returns the derived sites that are still computed after the pass.

    An edited one is computed in the pass. Scores and probabilities go together: rebuilt
    from an edited other, they would not be those of the pass.
    """
    if edited & ATTENTION_SITES:
        edited |= ATTENTION_SITES
    return frozenset(n for n, site in SITES.items() if site.derived) - edited


def check_site(site: str, absent: Collection[str]) -> None:
    """Raises ValueError for a name of no site, or of one that a model has not.

    Args:
      site: the name.
      absent: the sites that the model has not.
    """
    if site not in SITES or site in absent:
        valid = [name for name in SITES if name not in absent]
        raise ValueError(
            f"no site {site!r} in this model{nearest(site, valid)}; "
            f"sites: {', '.join(valid)}"
        )


def check_chosen(
    where: str, site: Site, chosen: Mapping[str, Any], sizes: Mapping[str, int]
) -> None:
    """Checks the layers, positions and heads that a tap or an edit chooses.

    Args:
      where: begins the message.
      site: what it reads or changes.
      chosen: by the name of the argument, which begins with `layer`, `position` or
        `head`: integers, one or several, maybe traced; None for all.
      sizes: size of each letter; positions count up to `C`, those from the end of a
        call to `T`.

    Raises:
      ValueError: for a choice that the site does not have, or an index out of range.
    """
    heads = "N" if site.axis("N") is not None else "K"
    first = {"positions": -sizes.get("T", 0)}
    limits = {"layer": "L", "position": "C", "positions": "T", "head": heads}
    for name, indices in chosen.items():
        if indices is None:
            continue
        if name.startswith("layer") and site.outside_layers:
            raise ValueError(f"{where}: it lies outside the layers: no {name}=")
        if name.startswith("head") and site.axis("NK") is None:
            raise ValueError(f"{where}: [{site.shape}] has no heads: no {name}=")
        if isinstance(indices, tuple):
            indices = np.array(indices)
        if not jnp.issubdtype(jnp.result_type(indices), jnp.integer):
            raise ValueError(f"{where}: {name} is {indices!r}: give integers")
        if jnp.ndim(indices) > 1:
            raise ValueError(
                f"{where}: {name} has {jnp.ndim(indices)} axes: give a vector"
            )
        if isinstance(indices, Tracer):
            continue
        least = first.get(name, 0)
        limit = sizes[limits.get(name, limits[name.rstrip("s")])]
        for index in np.ravel(indices):
            if not least <= index < limit:
                raise ValueError(
                    f"{where}: {name.rstrip('s')} {index} is not among {least} to "
                    f"{limit - 1}"
                )
