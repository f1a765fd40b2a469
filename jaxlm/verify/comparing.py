"""The computations and comparisons of `jaxlm verify`.

Gates: two correct programs differ in float32, because they add in different orders. The
difference grows with the size of the numbers and, as independent roundings accumulate,
with the square root of the number of layers. A wrong rotation, mask, norm or weight
changes logits by far more. So logits may differ by `LOGITS * sqrt(layers) * max(1, s)`,
where s is their standard deviation; docs/verify.md has the measurements.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.infer.generate import Generation, generate
from jaxlm.infer.prefill import bucket
from jaxlm.model.initialization import init_cache
from jaxlm.model.kv_cache import Cache
from jaxlm.model.transformer import forward
from jaxlm.ops.probing.tap import Tap
from jaxlm.tree import unstack
from jaxlm.types import Params
from jaxlm.verify.check import Check, at_most, number
from jaxlm.verify.expected import Expected, log_sum_exp

# Names of the rows.
FIRST_LAYER = "first layer that differs"
LARGEST = "logits, largest difference"
DIVERGENCE = "KL divergence, nats"
GREEDY = "greedy tokens"
DECODING = "decoding with a cache"
BATCH = "a batch against its rows"

LOGITS = 1e-4
# The same program on other shapes: the order of addition changes in fewer sums.
ROWS = 1e-5
KL = 1e-4
# If a router nearly ties, a rounding error sends a token to another expert. Earlier
# tokens are not affected; at least this many of them must be compared.
MIN_TOKENS = 8
NUM_GREEDY = 32
NUM_NEW = 16
# RoPE scalings whose rotations depend on the length of the text.
_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True, eq=False)
class FullPass:
    """The results of one forward pass over a text without a cache, on the host."""

    logits: Float32[np.ndarray, "T V"]
    """Logits of the next token after each token."""
    residual: Float32[np.ndarray, "S T D"]
    """Residual stream: embeddings, then after each layer."""
    router_margins: Float32[np.ndarray, "T"] | None
    """The smallest margin of any router's choice for each token; None: no routers."""


@partial(jax.jit, static_argnums=(0, 3))
def _forward(config: ModelConfig, params: Params, tokens, taps: tuple[Tap, ...]):
    out = forward(config, params, tokens, taps=taps)
    return out.logits[0], dict(out.trace)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _extend(config: ModelConfig, params: Params, tokens, cache):
    out = forward(config, params, tokens, cache=cache)
    return out.logits[0], out.cache


def full_pass(
    config: ModelConfig, params: Params, tokens: Int[np.ndarray, "T"]
) -> FullPass:
    """Computes the logits and the residual stream of a text."""
    taps = [Tap("resid_pre", (0,)), Tap("resid_post")]
    routed = 0 < config.experts_per_token < config.num_experts
    if routed:
        taps.append(Tap("router_logits"))
    ids = jnp.asarray(tokens, jnp.int32)[None]
    logits, trace = jax.device_get(_forward(config, params, ids, tuple(taps)))
    stages = [trace["resid_pre"][:, 0], trace["resid_post"][:, 0]]
    margins = None
    if routed:
        ordered = -np.sort(-trace["router_logits"][:, 0], axis=-1)
        k = config.experts_per_token
        margins = (ordered[..., k - 1] - ordered[..., k]).min(axis=0)
    return FullPass(logits, np.concatenate(stages), margins)


def gate(config: ModelConfig, spread: Any = 1.0, base: float = LOGITS) -> float:
    """Returns how far values of this standard deviation may differ; see above."""
    return base * math.sqrt(config.num_layers) * max(1.0, float(spread))


def steady_length(config: ModelConfig) -> int:
    """Returns the length in tokens up to which RoPE does not depend on the length."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in _BY_LENGTH:
        return config.context_length
    return scaling.original_context_length or config.context_length


def _first_tie(
    ratios: np.ndarray, at: np.ndarray, ours: FullPass, margin: float
) -> int | None:
    """Returns the index into `at` from which a router's tie explains the errors.

    Args:
      ratios: [n] errors of the tokens `at`, divided by the gate.
      at: [n] indices of tokens, in ascending order.
      margin: a router's choice by a smaller margin is a tie.

    Returns:
      The index; None if no error exceeds the gate, or no tie explains the first one.
    """
    bad = np.flatnonzero(~(ratios <= 1))
    if ours.router_margins is None or not bad.size:
        return None
    first = int(bad[0])
    before = int(at[first - 1]) if first else -1
    smallest = ours.router_margins[before + 1 : int(at[first]) + 1].min()
    return first if smallest <= margin and first >= MIN_TOKENS else None


def compare_with(
    expected: Expected, config: ModelConfig, ours: FullPass
) -> list[Check]:
    """Compares layers, logits and KL divergence with those of a reference."""
    residual, end = _compare_residual(expected, config, ours)
    keep = expected.rows < end
    rows, logits = expected.rows[keep], expected.logits[keep]
    ids = None if expected.ids is None else expected.ids[keep]
    mine = ours.logits[rows]
    sums = log_sum_exp(mine)
    picked = mine if ids is None else np.take_along_axis(mine, ids, axis=1)
    differences = (picked - logits, sums - expected.log_sums[keep])
    worst = float(np.max([np.abs(x).max() for x in differences]))
    what = "" if ids is None else f"the {ids.shape[1]} largest and the sum of "
    note = (
        f"{what}all logits after {len(rows)} tokens; their deviation is "
        f"{expected.logit_spread:.2f}"
    )
    largest = at_most(LARGEST, worst, gate(config, expected.logit_spread), note)
    pairs = zip(logits, expected.log_sums[keep], picked, sums, strict=True)
    kl = float(
        np.max([_divergence(a - s, b - t, whole=ids is None) for a, s, b, t in pairs])
    )
    note = "" if ids is None else "all other tokens taken as one"
    return [residual, largest, at_most(DIVERGENCE, kl, KL, note)]


def _divergence(
    p: Float32[np.ndarray, "k"], q: Float32[np.ndarray, "k"], *, whole: bool
) -> float:
    """Computes KL(p || q) from log-probabilities, in nats.

    Unless `whole`, the tokens that are missing count as one more token.
    """
    p, q = p.astype(np.float64), q.astype(np.float64)
    # Probabilities from f32 sum to nearly 1; the last two terms take the error out.
    kl = float(np.sum(np.exp(p) * (p - q) - np.exp(p) + np.exp(q)))
    if whole:
        return kl
    rest_p, rest_q = (max(1 - np.exp(x).sum(), 1e-12) for x in (p, q))
    return kl + float(rest_p * np.log(rest_p / rest_q) - rest_p + rest_q)


def _compare_residual(
    expected: Expected, config: ModelConfig, ours: FullPass
) -> tuple[Check, int]:
    """Returns the row about layers, and the number of tokens to compare."""
    places, theirs = expected.places, expected.residual
    # In some models a few numbers are thousands of times larger than the others: their
    # error is relative to their own size.
    if places is None:
        scale = np.maximum(np.abs(theirs), expected.spreads[:, None, None])
        errors = (np.abs(ours.residual - theirs) / scale).max(axis=-1)
        at = np.arange(theirs.shape[1])
    else:
        scale = np.maximum(np.abs(theirs), expected.spreads[:, None])
        mine = ours.residual[:, places[:, 0], places[:, 1]]
        at, group = np.unique(places[:, 0], return_inverse=True)
        errors = np.zeros((len(theirs), len(at)))
        np.maximum.at(errors.T, group, (np.abs(mine - theirs) / scale).T)
    # Rounding errors accumulate from layer to layer.
    limits = LOGITS * np.sqrt(np.maximum(1, np.arange(len(errors))))
    ratios = errors / limits[:, None]
    tie = _first_tie(ratios.max(axis=0), at, ours, gate(config))
    end, note = len(expected.tokens), ""
    if tie is not None:
        end = int(at[tie])
        errors, ratios = errors[:, :tie], ratios[:, :tie]
        note = f"compared up to token {end}, where a router's choice is a tie"
    largest = errors.max(axis=1)
    bad = np.flatnonzero(~(largest <= limits))
    stage = int(bad[0]) if bad.size else int(ratios.max(axis=1).argmax())
    name = f"layer {stage - 1}" if stage else "the embeddings"
    size = number(largest[stage])
    measured = f"{name} ({size})" if bad.size else f"none, at most {size} in {name}"
    check = Check(
        FIRST_LAYER,
        measured,
        f"{number(limits[stage])} of it",
        not bad.size,
        note,
        float(largest[stage]),
    )
    return check, end


def compare_greedy(expected: Expected, config: ModelConfig, params: Params) -> Check:
    """Compares greedy tokens of `generate` with those of the reference."""
    n = len(expected.greedy)
    prompt = expected.tokens[: expected.prompt_length]
    new = _greedy(config, params, [prompt], n).tokens[0]
    apart = np.flatnonzero(new != expected.greedy)
    same = int(apart[0]) if apart.size else n
    passed, note = same == n, ""
    if not passed:
        limit = 2 * gate(config, expected.logit_spread)
        gap = float(expected.gaps[same])
        passed = gap <= limit
        note = "where they part, the reference's two likeliest tokens differ by "
        note += f"{number(gap)}: {'a tie' if passed else 'no tie'} at {number(limit)}"
    measured = f"{same} of {n} alike"
    return Check(GREEDY, measured, "all, or a tie", passed, note, float(same))


def _greedy(config, params, prompts, num_new: int) -> Generation:
    sample = SampleConfig(max_new_tokens=num_new, temperature=0.0)
    return generate(config, params, prompts, sample, jax.random.key(0))


def check_decoding(
    config: ModelConfig, params: Params, tokens: Int32[np.ndarray, "T"], ours: FullPass
) -> Check:
    """Compares prefill and decoding of single tokens with one forward pass."""
    tokens = tokens[: steady_length(config)]
    if len(tokens) < len(ours.logits):
        ours = full_pass(config, params, tokens)
    short = min(48, len(tokens))
    splits = {(k, short) for k in (1, 3, short // 2, short - 1) if 0 < k < short}
    splits.add((max(1, len(tokens) - 16), len(tokens)))
    worst, limit = 0.0, gate(config, ours.logits.std())
    layers, note = _layer_by_layer(config, params), ""
    size = bucket(len(tokens), config.context_length)
    for first, length in sorted(splits):
        found = _in_parts(config, params, layers, tokens[:length], first, size)
        errors = np.abs(found - ours.logits[:length]).max(axis=1)
        tie = _first_tie(errors / limit, np.arange(length), ours, gate(config))
        if tie is not None:
            errors, note = errors[:tie], f"up to token {tie}: a router's tie"
        worst = float(np.maximum(worst, errors.max()))  # keeps NaN, unlike max()
    prompts = ", ".join(str(first) for first, _ in sorted(splits))
    return at_most(DECODING, worst, limit, note or f"prompts of {prompts} tokens")


@partial(jax.jit, static_argnums=0)
def _layer_by_layer(config: ModelConfig, params: Params) -> dict[str, Any]:
    return {**params, "layers": unstack(params["layers"], config.num_layers)}


def _in_parts(
    config: ModelConfig,
    params: Params,
    layers: Params,
    tokens: Int32[np.ndarray, "T"],
    first: int,
    size: int,
) -> Float[np.ndarray, "T V"]:
    """Returns logits from a prefill of `first` tokens and then one token at a time.

    Args:
      layers: the parameters, with the layers unstacked as in `generate`.
      size: capacity of the cache in tokens.
    """
    cache = init_cache(config, 1, size, jnp.float32)
    logits, cache = _extend(config, params, jnp.asarray(tokens[None, :first]), cache)
    cache = Cache(unstack(cache.layers, config.num_layers), cache.lengths)
    found = [logits]
    for token in tokens[first:]:
        logits, cache = _extend(config, layers, jnp.asarray([[token]]), cache)
        found.append(logits)
    return np.concatenate(jax.device_get(found))


def check_rows(
    config: ModelConfig, params: Params, tokens: Int32[np.ndarray, "T"], ours: FullPass
) -> Check:
    """Compares prompts of different lengths in one batch with each prompt alone."""
    new = max(1, min(NUM_NEW, config.context_length // 4))
    longest = max(1, min(64, len(tokens), config.context_length - new))
    lengths = (max(1, longest // 3), max(1, longest // 2), longest)
    prompts = [tokens[i : i + n] for i, n in enumerate(lengths[:2])]
    prompts.append(tokens[:longest])
    together = _greedy(config, params, prompts, new)
    worst, alike, note = 0.0, 0, ""
    limit = gate(config, ours.logits.std(), ROWS)
    passed = True
    for i, prompt in enumerate(prompts):
        alone = _greedy(config, params, [prompt], new)
        apart = np.flatnonzero(alone.tokens[0] != together.tokens[i])
        same = int(apart[0]) if apart.size else new
        if same < new:
            so_far = np.concatenate([prompt, alone.tokens[0][:same]])
            last = np.sort(full_pass(config, params, so_far).logits[-1])
            passed &= bool(last[-1] - last[-2] <= 2 * limit)
            note = f"prompt {i} differs after {same} tokens, where two tokens differ "
            note += f"by {number(last[-1] - last[-2])}"
        alike += same
        between = together.logprobs[i, :same] - alone.logprobs[0, :same]
        worst = float(np.maximum(worst, np.abs(between).max(initial=0.0)))
    measured = f"{alike} of {new * len(prompts)} tokens, log-probabilities within "
    measured += number(worst)
    passed = passed and worst <= limit
    note = note or f"prompts of {', '.join(map(str, lengths))} tokens"
    return Check(BATCH, measured, number(limit), passed, note, worst)
