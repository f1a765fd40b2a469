"""Sampling as it is: what each rule of `sampling.py` leaves of the next token."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jaxlm.config import SampleConfig
from jaxlm.infer.row_settings import row_settings
from jaxlm.infer.rules.filters import NEVER
from jaxlm.infer.rules.penalties import History
from jaxlm.infer.sampling import GREEDY_BELOW, filter_rules, penalized


class SamplingStep(NamedTuple):
    """One position's next token after a rule, on the host."""

    rule: str
    """`model` (no rule yet), `penalties` (all that comes before the temperature), or
    the rule's field in `SampleConfig`."""
    probabilities: Float[np.ndarray, " V"]
    """f32; they sum to 1 over what is left."""
    kept: Bool[np.ndarray, " V"]
    """Tokens that can still be drawn."""
    removed: float
    """How much of the probability before the rule was on tokens that it removed."""


def sampling_steps(
    logits: Float[Array | np.ndarray, " V"],
    sample: SampleConfig,
    *,
    prompt: Sequence[int] = (),
    new_tokens: Sequence[int] = (),
    token_bytes: Sequence[bytes] = (),
    key: Key[Array, ""] | None = None,
) -> list[SamplingStep]:
    """Returns the distribution before any rule, and after each rule that is in use.

    The rules are the ones that `generate` runs, in its order. With temperature 0 the
    most likely token is all that is left, and filters do not apply.

    Args:
      logits: of the next token at one position.
      prompt, new_tokens: the text so far, which penalties read.
      token_bytes: the text of each id, for `dry_breakers`.
      key: for `xtc_probability`, the only rule with chance; None takes that of seed 0.
    """
    x = jnp.asarray(logits, jnp.float32)[None]
    settings = row_settings([sample], x.shape[-1], token_bytes)
    settings = jax.tree.map(jnp.asarray, settings)
    text = [*prompt, *new_tokens]
    sizes = jnp.array([[len(text)], [len(prompt)]], jnp.int32)
    # One more place than tokens: an empty text has an array too.
    history = History(jnp.array([[*text, 0]], jnp.int32), *sizes)
    keys = (jax.random.key(0) if key is None else key)[None]

    steps = [_step("model", x, None)]
    x = penalized(x, settings, history)
    if not np.allclose(_probabilities(x), steps[0].probabilities, rtol=0, atol=0):
        steps.append(_step("penalties", x, steps[-1]))
    if sample.temperature < GREEDY_BELOW:
        largest = jnp.arange(x.shape[-1]) == jnp.argmax(x, axis=-1)[:, None]
        return [
            *steps,
            _step("temperature", jnp.where(largest, 0.0, NEVER), steps[-1]),
        ]
    defaults = SampleConfig()
    for rule, apply in filter_rules(keys, settings).items():
        x = apply(x)
        if getattr(sample, rule) != getattr(defaults, rule):
            steps.append(_step(rule, x, steps[-1]))
    return steps


def _probabilities(logits: Float[Array, "1 V"]) -> Float[np.ndarray, " V"]:
    return np.asarray(jax.nn.softmax(logits, axis=-1)[0])


def _step(
    rule: str, logits: Float[Array, "1 V"], before: SamplingStep | None
) -> SamplingStep:
    kept = np.asarray(logits[0] > NEVER / 2)
    lost = before is not None and before.probabilities[before.kept & ~kept].sum()
    return SamplingStep(rule, _probabilities(logits), kept, float(lost))
