"""Measure how well a model predicts texts, or answers multiple choice."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

import jax

from jaxlm.checkpoint.load import load_onto_mesh
from jaxlm.commands.generating.generation import open_with_dtype
from jaxlm.commands.process import use_compile_cache
from jaxlm.config import DataConfig, ModelConfig
from jaxlm.data.encoding import document_parts
from jaxlm.data.sources import Source, find_source
from jaxlm.evaluation.multiple_choice import (
    Accuracy,
    Question,
    accuracy,
    read_questions,
)
from jaxlm.evaluation.text_loss import TextLoss, check_windows, text_loss
from jaxlm.flags.arguments import EvalArguments
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.terminal.interrupts import ENDS, Interrupts
from jaxlm.terminal.progress import Waiting, progress_bar
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.types import Params


def main(chosen: EvalArguments) -> int:
    """Loads the model onto the devices requested and prints what was measured."""
    use_compile_cache()
    # What can be wrong is found before the weights are read.
    checkpoint, model = open_with_dtype(chosen.src, chosen.dtype)
    questions, source = [], None
    if chosen.choices is not None:
        questions = read_questions(chosen.choices)
    else:
        check_windows(model, chosen.context, chosen.stride)
        assert chosen.text is not None
        source = find_source(chosen.text)
    with jax.set_mesh(make_mesh_of_size(chosen.mesh)):
        with Waiting("loading the model"):
            tokenizer = checkpoint.tokenizer()
            params = load_onto_mesh(checkpoint, chosen.weights, model.dtype)
        if source is not None:
            figures = _measure_text(model, params, tokenizer, source, chosen)
        else:
            figures = _measure_choices(model, params, tokenizer, questions)
    if chosen.json:
        print(json.dumps(figures))
        return 0
    for name, value in figures.items():
        print(f"{name:14} {_shown(value)}")
    return 0


def _shown(value: float | int) -> str:
    return f"{value:{',.4f' if isinstance(value, float) else ','}}"


@contextlib.contextmanager
def _told(so_far: Callable[[], Mapping[str, float | int]]) -> Iterator[None]:
    """Tells on stderr what was measured until Ctrl-C, SIGTERM, SIGHUP or an error.

    Args:
      so_far: returns the figures, of which the first is 0 if there are none yet.
    """
    try:
        with Interrupts(ENDS):
            yield
    except BaseException:
        (what, number), *figures = so_far().items()
        if number:
            shown = ", ".join(f"{name} {_shown(value)}" for name, value in figures)
            line = f"ended early; of the first {number:,} {what}: {shown}"
            print(line, file=sys.stderr, flush=True)
        raise


def _measure_text(
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    source: Source,
    chosen: EvalArguments,
) -> dict[str, float | int]:
    context, stride = check_windows(model, chosen.context, chosen.stride)
    size = sum(file.path.stat().st_size for file in source.files)
    done, last = 0, TextLoss()

    def documents() -> Iterator[str]:
        nonlocal done
        parts = []
        for part in document_parts(source, tokenizer, DataConfig()):
            parts.append(part.text)
            done = part.done
            if part.ends:
                yield "".join(parts)
                parts.clear()

    def so_far() -> dict[str, float | int]:
        return {
            "tokens": last.tokens,
            "loss": last.loss,
            "perplexity": last.perplexity,
        }

    with (
        _told(so_far),
        progress_bar(f"predicting {source.name}", size) as advance_to,
    ):
        for sums in text_loss(
            *(model, params, tokenizer, documents()), context=context, stride=stride
        ):
            advance_to(done)
            last = sums
    if not last.tokens:
        raise ValueError(
            f"--text {source.name}: nothing to predict: its documents have one token"
        )
    return {
        "loss": last.loss,
        "perplexity": last.perplexity,
        "bits_per_byte": last.bits_per_byte,
        "documents": last.documents,
        "tokens": last.tokens,
        "bytes": last.bytes,
        "context": context,
        "stride": stride,
    }


def _measure_choices(
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    questions: list[Question],
) -> dict[str, float | int]:
    counts = Accuracy()
    sizes = list(accumulate(len(q.context.encode()) for q in questions))

    def so_far() -> dict[str, float | int]:
        return {"questions": counts.questions, **counts.rates()}

    with (
        _told(so_far),
        progress_bar("answering the questions", sizes[-1]) as advance_to,
    ):
        for counts in accuracy(model, params, tokenizer, questions):
            advance_to(sizes[counts.questions - 1])
    return {**counts.rates(), "questions": counts.questions}
