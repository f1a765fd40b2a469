"""What `jaxlm verify` computes with a model, and what it compares.

Gates. Two correct programs in float32 differ, because they add in different orders. The
difference grows with the numbers themselves and, as independent roundings add up, with
the root of the number of layers; a wrong rotation, mask, norm or weight moves logits by
far more. So logits may differ by `LOGITS * sqrt(layers) * max(1, their standard
deviation)`; docs/verify.md has what was measured.
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
from jaxlm.infer.generate import Generation, bucket, generate
from jaxlm.model.kv_cache import Cache, init_cache, unstack
from jaxlm.model.transformer import forward
from jaxlm.ops.probe import Tap
from jaxlm.types import Params
from jaxlm.verify.check import Check, number
from jaxlm.verify.expected import Expected, log_sum_exp

# Names of the rows.
FIRST_LAYER = "first layer that differs"
LARGEST = "logits, largest difference"
DIVERGENCE = "KL divergence, nats"
GREEDY = "greedy tokens"
DECODING = "decoding with a cache"
BATCH = "a row of a batch against it alone"

LOGITS = 1e-4
# The same program on other shapes: still other orders of addition, but fewer.
ROWS = 1e-5
KL = 1e-4
# A router that cannot decide between two experts sends a token elsewhere for a rounding
# error. Nothing before that token is touched; at least so many must be compared.
FEWEST_TOKENS = 8
NUM_GREEDY = 32
NUM_NEW = 16
# Stretchings whose rotations depend on the length of the text.
_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True, eq=False)
class Full:
    """One pass over a text without a cache, on the host."""

    logits: Float32[np.ndarray, "T V"]
    """Logits of the token after each."""
    residual: Float32[np.ndarray, "S T D"]
    """Residual stream: embeddings, then after each layer."""
    undecided: Float32[np.ndarray, "T"] | None
    """Of each token, the smallest margin by which a router chose; None: no routers."""


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
) -> Full:
    """Logits and residual stream of a text."""
    taps = [Tap("resid_pre", (0,)), Tap("resid_post")]
    routed = 0 < config.experts_per_token < config.num_experts
    if routed:
        taps.append(Tap("router_logits"))
    ids = jnp.asarray(tokens, jnp.int32)[None]
    logits, trace = jax.device_get(_forward(config, params, ids, tuple(taps)))
    stages = [trace["resid_pre"][:, 0], trace["resid_post"][:, 0]]
    undecided = None
    if routed:
        ordered = -np.sort(-trace["router_logits"][:, 0], axis=-1)
        k = config.experts_per_token
        undecided = (ordered[..., k - 1] - ordered[..., k]).min(axis=0)
    return Full(logits, np.concatenate(stages), undecided)


def gate(config: ModelConfig, spread: Any = 1.0, base: float = LOGITS) -> float:
    """How far values of a standard deviation may differ; see above."""
    return base * math.sqrt(config.num_layers) * max(1.0, float(spread))


def steady_length(config: ModelConfig) -> int:
    """Texts up to this length are rotated alike, whatever their length."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in _BY_LENGTH:
        return config.context_length
    return scaling.original_context_length or config.context_length


def _tied(shares: np.ndarray, at: np.ndarray, ours: Full, margin: float) -> int | None:
    """Index into `at` from which on a router's tie explains the errors, or None.

    Args:
      shares: [n] errors of the tokens `at`, in ascending order, as shares of the gate.
      margin: by less than this a router has not decided.
    """
    bad = np.flatnonzero(~(shares <= 1))
    if ours.undecided is None or not bad.size:
        return None
    first = int(bad[0])
    before = int(at[first - 1]) if first else -1
    smallest = ours.undecided[before + 1 : int(at[first]) + 1].min()
    return first if smallest <= margin and first >= FEWEST_TOKENS else None


def compare_with(expected: Expected, config: ModelConfig, ours: Full) -> list[Check]:
    """Layers, logits and KL divergence, ours against a reference's."""
    checks, end = _compare_residual(expected, config, ours)
    keep = expected.rows < end
    rows, logits = expected.rows[keep], expected.logits[keep]
    ids = None if expected.ids is None else expected.ids[keep]
    mine = ours.logits[rows]
    sums = log_sum_exp(mine)
    picked = mine if ids is None else np.take_along_axis(mine, ids, axis=1)
    differences = (picked - logits, sums - expected.log_sums[keep])
    worst = float(np.max([np.abs(x).max() for x in differences]))
    limit = gate(config, expected.logit_spread)
    what = "" if ids is None else f"the {ids.shape[1]} largest and the sum of "
    checks.append(
        Check(
            LARGEST,
            number(worst),
            number(limit),
            worst <= limit,
            f"{what}all logits after {len(rows)} tokens; their deviation is "
            f"{expected.logit_spread:.2f}",
            worst,
        )
    )
    pairs = zip(logits, expected.log_sums[keep], picked, sums, strict=True)
    kl = float(
        np.max([_divergence(a - s, b - t, whole=ids is None) for a, s, b, t in pairs])
    )
    note = "" if ids is None else "all other tokens taken as one"
    checks.append(Check(DIVERGENCE, number(kl), number(KL), kl <= KL, note, kl))
    return checks


def _divergence(
    p: Float32[np.ndarray, "k"], q: Float32[np.ndarray, "k"], *, whole: bool
) -> float:
    """KL(p || q) of log-probabilities; unless whole, with one more token, the rest."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    # Sums of f32 are 1 only nearly; the difference would count as a divergence.
    kl = float(np.sum(np.exp(p) * (p - q) - np.exp(p) + np.exp(q)))
    if whole:
        return kl
    rest_p, rest_q = (max(1 - np.exp(x).sum(), 1e-12) for x in (p, q))
    return kl + float(rest_p * np.log(rest_p / rest_q) - rest_p + rest_q)


def _compare_residual(
    expected: Expected, config: ModelConfig, ours: Full
) -> tuple[list[Check], int]:
    """The row about layers, and the number of tokens to compare."""
    places, theirs = expected.places, expected.residual
    # A few numbers of some models are thousands of times the others: those are held to
    # their own size.
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
    # Roundings add up from layer to layer.
    limits = LOGITS * np.sqrt(np.maximum(1, np.arange(len(errors))))
    shares = errors / limits[:, None]
    tie = _tied(shares.max(axis=0), at, ours, gate(config))
    end, note = len(expected.tokens), ""
    if tie is not None:
        end = int(at[tie])
        errors, shares = errors[:, :tie], shares[:, :tie]
        note = f"compared up to token {end}, where a router's choice is a tie"
    largest = errors.max(axis=1)
    bad = np.flatnonzero(~(largest <= limits))
    stage = int(bad[0]) if bad.size else int(shares.max(axis=1).argmax())
    name = f"layer {stage - 1}" if stage else "the embeddings"
    size = number(largest[stage])
    measured = f"{name} ({size})" if bad.size else f"none (at most {size}, {name})"
    check = Check(
        FIRST_LAYER,
        measured,
        f"{number(limits[stage])} of it",
        not bad.size,
        note,
        float(largest[stage]),
    )
    return [check], end


def compare_greedy(expected: Expected, config: ModelConfig, params: Params) -> Check:
    """Likeliest tokens by `generate` and by the reference."""
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
        note = f"there the two likeliest tokens of the reference are {number(gap)} "
        note += f"apart: {'a tie' if passed else 'no tie'} at {number(limit)}"
    measured = f"{same} of {n} alike"
    return Check(GREEDY, measured, "all, or a tie", passed, note, float(same))


def _greedy(config, params, prompts, num_new: int) -> Generation:
    sample = SampleConfig(max_new_tokens=num_new, temperature=0.0)
    return generate(config, params, prompts, sample, jax.random.key(0))


def check_decoding(
    config: ModelConfig, params: Params, tokens: Int32[np.ndarray, "T"], ours: Full
) -> Check:
    """Reading in two parts, prompt and single tokens, against one pass."""
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
        tie = _tied(errors / limit, np.arange(length), ours, gate(config))
        if tie is not None:
            errors, note = errors[:tie], f"up to token {tie}: a router's tie"
        worst = float(np.maximum(worst, errors.max()))  # NaN stays, unlike in max()
    prompts = ", ".join(str(first) for first, _ in sorted(splits))
    note = note or f"prompts of {prompts} tokens"
    return Check(
        DECODING,
        number(worst),
        number(limit),
        bool(worst <= limit),
        note,
        worst,
    )


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
    """Logits after a prompt of `first` tokens and then each token, as `generate` does.

    Args:
      layers: the parameters, unstacked.
      size: tokens that the cache has room for.
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
    config: ModelConfig, params: Params, tokens: Int32[np.ndarray, "T"], ours: Full
) -> Check:
    """Prompts of different lengths, together and each alone."""
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
            note = f"prompt {i} parts after {same} tokens, where two tokens are "
            note += f"{number(last[-1] - last[-2])} apart"
        alike += same
        between = together.logprobs[i, :same] - alone.logprobs[0, :same]
        worst = float(np.maximum(worst, np.abs(between).max(initial=0.0)))
    measured = f"{alike} of {new * len(prompts)} tokens, log-probabilities within "
    measured += number(worst)
    passed = passed and worst <= limit
    note = note or f"prompts of {', '.join(map(str, lengths))} tokens"
    return Check(BATCH, measured, number(limit), passed, note, worst)
