"""What `jaxlm look` shows of a model and a text: every number, and nothing drawn.

Letters of shapes are those of `types.py`; M is L + 1, the streams before the first and
after each layer. Arrays lie on the host, and have no axis B: the text is one row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float16, Int

from jaxlm.report.look.look_page import notebook_frame

# A JSON object.
Json = dict[str, Any]


@dataclass(frozen=True)
class TextView:
    """The tokens."""

    rows: list[Json]
    """Fields of `TokenRow`, with bytes in hexadecimal."""
    num_prompt: int
    """So many tokens are the prompt; the others were generated."""
    surprise: Float[np.ndarray, " T"]
    """`-log p` of each token in nats; NaN for the first."""
    rank: Int[np.ndarray, " T"]
    """How many tokens were likelier; -1 for the first."""


@dataclass(frozen=True)
class AnswerView:
    """The most likely next tokens at each position."""

    ids: Int[np.ndarray, "T k"]
    probabilities: Float[np.ndarray, "T k"]
    logits: Float[np.ndarray, "T k"]
    entropy: Float[np.ndarray, " T"]
    """Of the whole distribution, in nats."""


@dataclass(frozen=True)
class ChoiceView:
    """What sampling leaves of the next token."""

    positions: Int[np.ndarray, " p"]
    """Those with all logits, for which the page can choose anew."""
    logits: Float[np.ndarray, "p V"]
    settings: Json
    """Temperature, top-k, top-p and min-p that were given."""
    steps: list[Json]
    """Of the text's chosen position, what each rule removed (`SamplingStep`)."""


@dataclass(frozen=True)
class StreamView:
    """The residual stream of each token: what it would predict, and its length."""

    ids: Int[np.ndarray, "M T k"]
    """The likeliest tokens of the lens."""
    probabilities: Float[np.ndarray, "M T k"]
    entropy: Float[np.ndarray, "M T"]
    answer_rank: Int[np.ndarray, "M T"]
    """Rank of the token that the whole model finds likeliest there."""
    lengths: Float[np.ndarray, "M T"]


@dataclass(frozen=True)
class CacheView:
    """The KV cache after the text."""

    key_lengths: Float16[np.ndarray, "L T K"]
    value_lengths: Float16[np.ndarray, "L T K"]
    visible: Int[np.ndarray, "L T"]
    """1 where the next token can read it."""
    read: Float[np.ndarray, "L T"]
    """Probability with which it was read, a mean over heads and over the queries that
    could read it."""
    bytes_per_token: int


@dataclass(frozen=True)
class HeadView:
    """Attention of the heads that are kept."""

    heads: Int[np.ndarray, "n 2"]
    """Layer and head of each."""
    probabilities: Float16[np.ndarray, "n pairs"]
    """Row by row of the lower triangle, T (T + 1) / 2 pairs."""
    lse: Float[np.ndarray, "n T"]
    """Log-sum-exp of the scores: score = log p + lse."""
    value_lengths: Float[np.ndarray, "n T"]
    """|v W_O| of each key."""
    before_rotation: Float16[np.ndarray, "n H"]
    """The query at the chosen position, after qk-norm where there is one."""
    after_rotation: Float16[np.ndarray, "n H"]
    kinds: Float[np.ndarray, "n 4"]
    """Scores as previous-token, duplicate-token and induction head, and sink mass."""
    windows: list[int | None]
    """Tokens that each layer attends to; None: all."""
    rotary_dim: int
    """Dimensions of a head that are rotated; 0: none."""


@dataclass(frozen=True)
class UnitView:
    """Feed-forward units that wrote the likeliest token at some positions."""

    positions: Int[np.ndarray, " p"]
    layers: Int[np.ndarray, "p u"]
    units: Int[np.ndarray, "p u"]
    parts: Float[np.ndarray, "p u"]
    """What each adds to the logit of the likeliest token, over the mean of all."""
    totals: Float[np.ndarray, " p"]
    """What all units of all layers add to it."""
    activations: Float16[np.ndarray, "p u T"]
    """At every token."""
    promotes: Int[np.ndarray, "p u k"]
    """Tokens whose logits it raises most, as it is active at the position."""


@dataclass(frozen=True)
class ExpertView:
    """The experts that the router chose for each token, best first."""

    ids: Int[np.ndarray, "L T k"]
    weights: Float[np.ndarray, "L T k"]
    """What the output of each is multiplied with."""


@dataclass(frozen=True)
class AdditionView:
    """What is added to the stream, and how it is normalized before it is read."""

    attention: Float[np.ndarray, "L T"]
    """Length of what attention adds."""
    feed_forward: Float[np.ndarray, "L T"]
    attention_alignment: Float[np.ndarray, "L T"]
    """Cosine of it and of the stream that it is added to."""
    feed_forward_alignment: Float[np.ndarray, "L T"]
    attention_divisor: Float[np.ndarray, "L T"] | None
    """Of the norm before attention; None for models without one."""
    feed_forward_divisor: Float[np.ndarray, "L T"] | None
    attention_input: Float[np.ndarray, "L T"]
    """Length of what attention reads."""
    feed_forward_input: Float[np.ndarray, "L T"]


@dataclass(frozen=True)
class CauseView:
    """Who wrote the answer, and what happens without."""

    position: int
    tokens: tuple[int, int]
    """The answer, and the token whose logit is subtracted from it."""
    difference: float
    """Their logits' difference."""
    total: dict[str, float]
    """What the embedding and the final norm's bias add to it, and the sum of all parts;
    empty where logits are no sum."""
    parts: Float[np.ndarray, "L 2"] | None
    """What attention and feed-forward of each layer add to it."""
    heads: Float[np.ndarray, "L N"] | None
    """What each head adds."""
    keys: Float16[np.ndarray, "L N S"] | None
    """What each head adds by what it reads of each token; None where heads do not."""
    refusal: str | None
    """Why there are no parts or heads."""
    ablated: Int[np.ndarray, "n 2"]
    """Layer and head of those that were removed, one at a time."""
    ablation: Float[np.ndarray, " n"]
    """The difference, less the one without the head."""
    ablation_agreement: float | None
    """Rank correlation of it with what the head adds."""


@dataclass(frozen=True)
class ComparisonView:
    """The stream of another text, put into this one."""

    difference: float
    """The same logits' difference in the other text."""
    ids: Int[np.ndarray, " k"]
    """The other text's most likely next tokens at the position."""
    probabilities: Float[np.ndarray, " k"]
    estimate: Float[np.ndarray, "L T"]
    """By attribution patching: how the difference would change."""
    patched: Int[np.ndarray, "n 2"]
    """Layer and position of the patches that were made."""
    change: Float[np.ndarray, " n"]
    """How each changes the difference."""
    agreement: float | None
    """Rank correlation of the changes with their estimates."""
    first: int
    """The first token that is another: before it nothing can change."""


@dataclass(frozen=True)
class View:
    """All that the page, the terminal and the notebook show."""

    title: str
    call: str
    """The command or call that made it."""
    model: Json
    """Fields of the `ModelConfig`, and the number of parameters."""
    stages: list[Json]
    """The parts of the model, with their sites and weights, by `model_map.stages`."""
    left_out: list[str]
    """Sentences on what the view does not hold."""
    position: int
    """The position that answers: the last of the prompt."""
    pieces: dict[int, str]
    """Text of each token id that occurs in the view."""
    text: TextView
    answer: AnswerView
    choice: ChoiceView
    streams: StreamView
    jacobian: StreamView | None
    """The same by the Jacobian lens, but for the embedding; None without one."""
    cache: CacheView
    heads: HeadView
    units: UnitView | None
    units_refusal: str | None
    """Why there are no units."""
    experts: ExpertView | None
    additions: AdditionView
    causes: CauseView
    comparison: ComparisonView | None
    against: list[str]
    """Tokens of the other text; empty without one."""

    def _repr_html_(self) -> str:
        return notebook_frame(self)
