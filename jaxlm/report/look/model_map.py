"""The model as a way through its parts: what each reads and writes, and its weights."""

from dataclasses import asdict, dataclass
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.model.params import sizes, weights
from jaxlm.model.trace import absent_sites
from jaxlm.ops.probing.sites import SITES


@dataclass(frozen=True)
class Stage:
    """A part of the model, as the map draws it."""

    name: str
    sites: tuple[str, ...]
    weights: tuple[str, ...] = ()
    """How the paths of its weights begin."""
    place: str = "branch"
    """`stream`: it is the residual stream. `reads`: from it. `adds`: to it. `branch`:
    it goes on from the part before."""


STAGES = (
    Stage("Token ids", ("tokens",)),
    Stage("Embedding", ("embed", "pos_embed"), ("embed/",), "adds"),
    Stage("Stream into the layer", ("resid_pre",), place="stream"),
    Stage(
        "Norm",
        ("attn_norm_div", "attn_in"),
        ("layers/attn_norm", "layers/attn_pre"),
        "reads",
    ),
    Stage(
        "Queries, keys, values",
        ("q", "k", "v", "q_normed", "k_normed", "q_rot", "k_rot"),
        ("layers/attn/q", "layers/attn/k", "layers/attn/v"),
    ),
    Stage(
        "Attention",
        ("attn_scores", "attn_lse", "attn_probs", "z"),
        ("layers/attn/sink",),
    ),
    Stage(
        "Output of attention",
        ("head_out", "attn_out", "attn_out_post"),
        ("layers/attn/o", "layers/attn_post", "layers/attn_out"),
        "adds",
    ),
    Stage("Stream between", ("resid_mid",), place="stream"),
    Stage("Norm", ("mlp_norm_div", "mlp_in"), ("layers/mlp_norm",), "reads"),
    Stage(
        "Feed-forward",
        (
            *("router_logits", "expert_ids", "expert_weights"),
            *("mlp_pre", "mlp_up", "mlp_act", "mlp_out", "mlp_out_post"),
        ),
        ("layers/mlp/", "layers/moe", "layers/mlp_post", "layers/mlp_out"),
        "adds",
    ),
    Stage("Stream out of the layer", ("resid_post",), place="stream"),
    Stage("Last norm", ("final_norm_div", "final_norm"), ("final_norm",), "reads"),
    Stage("Output head", ("logits",), ("lm_head",)),
)


def stages(config: ModelConfig, num_tokens: int) -> list[dict[str, Any]]:
    """Returns the parts that a model has, with shapes for one text, as JSON objects.

    Each has `name`, `place`, `size` (the shape in words), `in_layer`, `sites` (fields
    of `Site`, name, shape) and `weights` (path, shape).
    """
    letters = {**sizes(config), "B": 1, "T": num_tokens, "S": num_tokens, "1": 1}
    letters["k"] = config.experts_per_token
    absent, shapes = absent_sites(config), weights(config)
    found = []
    for stage in STAGES:
        sites = []
        for name in stage.sites:
            if name in absent:
                continue
            site = SITES[name]
            shape = [letters[letter] for letter in site.shape.split()]
            of_site = {**asdict(site), "letters": site.shape, "shape": shape}
            sites.append({"name": name, **of_site})
        if not sites:
            continue
        begins = stage.weights
        if stage.name == "Output head" and config.tied_embeddings:
            begins = ("embed/table",)
        found.append(
            {
                "name": stage.name,
                "place": stage.place,
                "in_layer": not sites[0]["outside_layers"],
                "size": _size(config, stage.name, sites),
                "sites": sites,
                "weights": [
                    {"path": path, "shape": list(weight.shape(config))}
                    for path, weight in shapes.items()
                    if path.startswith(begins)
                ],
            }
        )
    return found


def _size(config: ModelConfig, name: str, sites: list[dict[str, Any]]) -> str:
    """Returns the shape of what a part makes, without the axis of texts."""
    telling = {site["name"]: site["shape"][1:] for site in sites}
    last = sites[-1]["shape"][1:]
    if name == "Queries, keys, values":
        heads = f"({config.num_heads} + 2 × {config.num_kv_heads})"
        return f"{heads} × {config.head_dim}"  # of each token
    if name == "Feed-forward" and "mlp_act" in telling:
        return f"{last[0]} × {telling['mlp_act'][1]} → {last[1]}"
    return " × ".join(map(str, telling.get("attn_probs", last)))
