"""What an engine is asked for, and what it answers."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlm.config import SampleConfig
from jaxlm.infer.rules.automata import Automaton
from jaxlm.types import Trace


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, and how it is continued."""

    tokens: Int[np.ndarray, " _"]
    """The prompt, int32: at least one token."""
    sample: SampleConfig
    key: Key[Array, ""]
    """All draws of this text follow from it."""
    grammar: Automaton | None = None
    """What the new text follows, as `token_grammar` makes it for the same `sample`.
    Requests with the same object share its place in memory."""

    @property
    def has_automata(self) -> bool:
        """Whether it takes room in the table of automata."""
        return bool(self.sample.stop_strings) or self.grammar is not None


@dataclass(frozen=True, eq=False)
class NewTokens:
    """What a step adds to the text of a request."""

    number: int
    """Of the request, as `Engine.submit` returned it."""
    tokens: Int[np.ndarray, " n"]
    """int32, those of a stop string included, without a stop token."""
    logprobs: Float[np.ndarray, " n"]
    """Log-probability of each among the tokenizer's ids, f32, before any rule."""
    top_tokens: Int[np.ndarray, "n top"]
    """The most likely tokens in the place of each, the first first."""
    top_logprobs: Float[np.ndarray, "n top"]
    """Their log-probabilities."""
    ended: Literal["stop", "length", "error"] | None
    """Why the text ends here; None: it goes on."""
    trace: Trace
    """What the taps have read at these tokens; the first has the prompt's too."""
    num_proposed: int = 0
    """Tokens that `speculate` has guessed."""
    num_accepted: int = 0
    """Those of them that are among `tokens`."""
    error: Exception | None = None
    """What has failed, of this request only."""


@dataclass(eq=False)
class Running:
    """A request in a slot."""

    number: int
    """As `Engine.submit` returned it; -1 in a slot where nothing runs."""
    request: Request
    automata: dict[Any, int] = field(default_factory=dict)
    """The first state of each of its automata in the table of all."""
    is_read: bool = False
    """Whether its prompt is in the slot."""
    length: int = 0
    """New tokens so far."""
    prompt_trace: Trace | None = None
    """Until the first new tokens."""
