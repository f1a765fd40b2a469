"""Flags without an effect beside the other settings of a run."""

from collections.abc import Iterator, Mapping
from operator import attrgetter

from jaxlm.config import Config

_ADAM = ("adamw", "lion", "muon")
# Field -> the field that decides whether it has an effect, and the values with one.
_NEEDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "data.tokenizer_vocab_size": ("data.tokenizer", ("bpe", "sentencepiece")),
    "data.tokenizer_algorithm": ("data.tokenizer", ("sentencepiece",)),
    "model.rope_theta": ("model.position", ("rope",)),
    "model.rope_fraction": ("model.position", ("rope",)),
    "optimizer.adam_learning_rate": ("optimizer.name", ("muon",)),
    "optimizer.momentum": ("optimizer.name", ("muon",)),
    "optimizer.b1": ("optimizer.name", _ADAM),
    "optimizer.b2": ("optimizer.name", _ADAM),
    "optimizer.epsilon": ("optimizer.name", ("adamw", "muon")),
    "optimizer.decay_fraction": ("optimizer.schedule", ("wsd",)),
    "optimizer.final_fraction": ("optimizer.schedule", ("cosine", "linear", "wsd")),
}


def unused(config: Config, given: Mapping[str, object]) -> Iterator[str]:
    """Yields a line for each flag that changes nothing in a run.

    Args:
      config: the run.
      given: path of each field that a flag has set.
    """
    for path in sorted(given.keys() & _NEEDS.keys()):
        other, values = _NEEDS[path]
        if (value := attrgetter(other)(config)) not in values:
            flag, cause = (f"--{name.replace('_', '-')}" for name in (path, other))
            yield (
                f"{flag} has no effect: {cause} is {value}, not {' or '.join(values)}"
            )
