"""Continue a text with a trained model."""

import dataclasses
import errno
import os
import signal
import sys
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxlm.checkpoint.load import load_onto_mesh
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.commands.generating.generation import (
    open_model,
    read_proposer,
    with_stop_ids,
)
from jaxlm.commands.generating.sampled_text import (
    beam_lines,
    colored_texts,
    for_stdout,
    json_lines,
    plain_texts,
)
from jaxlm.commands.process import use_compile_cache
from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.files.bounded import read_bounded
from jaxlm.files.strict_json import parse
from jaxlm.flags.arguments import SampleArguments
from jaxlm.infer.beam_search import beam_search
from jaxlm.infer.check_arguments import check_room
from jaxlm.infer.generate import Generation, generate
from jaxlm.infer.grammar.json_schema import json_schema
from jaxlm.infer.grammar.regex import regex
from jaxlm.infer.grammar.token_grammar import token_grammar
from jaxlm.infer.rules.automata import Automaton
from jaxlm.infer.rules.stop_strings import StopText
from jaxlm.infer.speculative.proposals import Proposer
from jaxlm.sharding.device_memory import available_memory, gib
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.terminal.interrupts import ENDS, TextInterrupts
from jaxlm.terminal.progress import Waiting
from jaxlm.tokenizers.base import TextStream, Tokenizer
from jaxlm.types import Params

# No context is that long, and /dev/zero has no end.
_MAX_PROMPT_BYTES = 64 << 20
_STOPPING = "stopping as soon as possible; Ctrl-C again ends at once"
_BYTES_OF_SAMPLE = 4096  # at least: its objects, and a token


def main(chosen: SampleArguments) -> int:
    """Loads the model onto the devices requested and continues the prompt."""
    use_compile_cache()
    text = read_prompt(chosen)
    if chosen.show_probs and not sys.stdout.isatty():
        raise ValueError("--show-probs colors a terminal: take --json for a file")
    # A download shows its own progress.
    checkpoint, model = _open_model(chosen)
    with jax.set_mesh(make_mesh_of_size(chosen.mesh)):
        with Waiting("loading the model"):
            tokenizer = checkpoint.tokenizer()
            prompt = tokenizer.encode_prompt(text)
            flag = "--prompt" if chosen.prompt_file is None else "--prompt-file"
            check_room(flag, prompt, 1, model.context_length)
            params = load_onto_mesh(checkpoint, chosen.weights)
            speculate = read_proposer(chosen.speculate, chosen.dtype, tokenizer)
        if chosen.beams:
            write_beams(model, params, tokenizer, text, chosen)
            return 0
        result = write_samples(model, params, tokenizer, text, chosen, speculate)
    if chosen.look is not None:
        from jaxlm.commands.generating.generation_page import write_generation

        with Waiting("looking inside"):
            write_generation(model, params, tokenizer, prompt, result.rows[0], chosen)
        print(chosen.look, file=sys.stderr)
    return 0


def read_prompt(chosen: SampleArguments) -> str:
    """Returns the text to continue: of a flag, of a file or of stdin.

    Raises:
      ValueError: if the file cannot be read or is not UTF-8.
    """
    path = chosen.prompt_file
    if path is None:
        return "\n" if chosen.prompt is None else chosen.prompt
    name = "stdin" if str(path) == "-" else str(path)
    try:
        if name == "stdin":
            data = sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1)
            if len(data) > _MAX_PROMPT_BYTES:
                words = f"it has more than {_MAX_PROMPT_BYTES:,} bytes"
                raise OSError(errno.EFBIG, words)
        else:
            data = read_bounded(path, _MAX_PROMPT_BYTES)
        text = data.decode("utf-8")
    except OSError as error:
        raise ValueError(f"--prompt-file {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt-file {name} is not UTF-8 at byte {error.start}: convert it first"
        ) from None
    # Without the byte order mark that some editors begin a file with.
    return text.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


def read_grammar(
    chosen: SampleArguments,
    model: ModelConfig,
    tokenizer: Tokenizer,
    sample: SampleConfig,
) -> Automaton | None:
    """Returns the automaton of `--regex` or `--json-schema`; None without them.

    Raises:
      ValueError: if the pattern or the schema is wrong, or is not supported.
    """
    flag = "--regex" if chosen.json_schema is None else "--json-schema"
    try:
        if chosen.json_schema is not None:
            flag = f"--json-schema {chosen.json_schema}"
            data = chosen.json_schema.read_bytes()
            part = json_schema(parse(data, "the file", allow_nan=False))
        elif chosen.regex is not None:
            part = regex(chosen.regex)
        else:
            return None
        return token_grammar(part, tokenizer.token_bytes, model.vocab_size, sample)
    except OSError as error:
        raise ValueError(f"{flag}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _open_model(chosen: SampleArguments) -> tuple[Checkpoint, ModelConfig]:
    try:
        return open_model(chosen)
    except ValueError as error:
        run = chosen.run
        if run is None or run.startswith("hf:") or os.path.exists(run):
            raise
        raise ValueError(f"{error}; a text goes after --prompt") from None


def write_samples(
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    text: str,
    chosen: SampleArguments,
    speculate: Proposer | None = None,
) -> Generation:
    """Samples continuations of a text, writes them to stdout, and returns them.

    The first is streamed, unless the form is another (`--json`, `--show-probs`). After
    Ctrl-C, SIGTERM or SIGHUP what there is of each is written.
    """
    num_samples = chosen.best_of or chosen.num_samples
    check_memory_of(num_samples)
    prompt = tokenizer.encode_prompt(text)
    room = model.context_length - len(prompt)
    limit = min(room, chosen.sample.max_new_tokens)
    sample = dataclasses.replace(chosen.sample, max_new_tokens=limit)
    sample = with_stop_ids(sample, tokenizer)
    grammar = read_grammar(chosen, model, tokenizer, sample)
    streams = not (chosen.json or chosen.show_probs or chosen.best_of)
    with Printer(
        *(tokenizer, text, num_samples),
        stop_strings=sample.stop_strings,
        streams=streams,
    ) as printer:
        result = generate(
            model,
            params,
            [prompt] * num_samples,
            sample,
            jax.random.key(chosen.seed),
            num_tokens=tokenizer.vocab_size,
            token_bytes=tokenizer.token_bytes,
            top_logprobs=chosen.top_logprobs,
            cache=chosen.cache,
            on_tokens=printer.feed,
            grammars=[grammar] * num_samples,
            speculate=speculate,
        )
    shown = result
    if None in result.ended:  # Some may not have begun.
        shown = result.take(np.flatnonzero(result.lengths))
    if chosen.best_of:
        shown = shown.best(chosen.num_samples)
    if not streams:
        form = plain_texts
        if chosen.json or chosen.show_probs:
            form = json_lines if chosen.json else colored_texts
        for line in form(shown, tokenizer, text, sample):
            print(line)
    if None in result.ended:
        raise printer.ending()
    result = shown
    if limit < chosen.sample.max_new_tokens and (result.lengths == limit).any():
        print(
            f"stopped after {limit} new tokens: the model's context of "
            f"{model.context_length} tokens is full",
            file=sys.stderr,
        )
    if chosen.stats:
        print_stats(result)
    return result


def check_memory_of(num_samples: int) -> None:
    """Raises a ValueError for more samples than the memory holds: all are kept."""
    needed, available = num_samples * _BYTES_OF_SAMPLE, available_memory()
    if needed > available:
        raise ValueError(
            f"{num_samples:,} samples need at least {gib(needed)}, and there are "
            f"{gib(available)}: take fewer at once, with another --seed each time"
        )


def write_beams(
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    text: str,
    chosen: SampleArguments,
) -> None:
    """Searches for the likeliest continuations, and writes them to stdout."""
    assert chosen.beams is not None
    prompt = tokenizer.encode_prompt(text)
    room = model.context_length - len(prompt)
    with Waiting("searching for the likeliest texts"):
        (beams,) = beam_search(
            *(model, params, [prompt]),
            num_beams=chosen.beams,
            max_new_tokens=min(room, chosen.sample.max_new_tokens),
            length_penalty=chosen.length_penalty,
            stop_ids=with_stop_ids(chosen.sample, tokenizer).stop_ids,
            num_tokens=tokenizer.vocab_size,
            cache=chosen.cache,
        )
    for line in beam_lines(
        beams[: chosen.num_samples], tokenizer, text, as_json=chosen.json
    ):
        print(line)


class Printer:
    """Streams the first sample to stdout, and prints the others after it.

    The prompt is printed with the first new tokens, so log lines don't split prompt and
    text, and a rejected prompt isn't printed.

    A signal before the first tokens is raised; after them it ends the generation, and
    what there is of each sample is printed. So it is after an error.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        num_samples: int,
        *,
        stop_strings: Sequence[str] = (),
        streams: bool = True,
    ):
        """Without `streams`, nothing is printed."""
        self._is_silent = not streams
        self._interrupts = TextInterrupts(_STOPPING, raises_again=True, exit_codes=ENDS)
        self._begun = False
        self._streams = [TextStream(tokenizer) for _ in range(num_samples)]
        self._stops = [StopText(stop_strings) for _ in range(num_samples)]
        self._texts = [prompt] * num_samples

    def __enter__(self) -> "Printer":
        self._interrupts.are_raised = True
        self._interrupts.__enter__()
        self._waiting = Waiting("compiling and reading the prompt")
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._interrupts.__exit__()
        self._waiting.finish()
        if self._is_silent:
            return
        if kind is None or (self._begun and issubclass(kind, Exception)):
            self._finish()
        elif self._begun:
            print(flush=True)

    def ending(self) -> BaseException:
        """Returns what to raise after a generation that a signal has ended."""
        return self._interrupts.ending(self._interrupts.received or signal.SIGINT)

    def feed(
        self, new: Int[np.ndarray, "B n"], inside: Bool[np.ndarray, "B n"]
    ) -> bool:
        """Adds new tokens of each sample; `inside` masks those that are text.

        Returns:
          Whether the generation should end.
        """
        self._interrupts.are_raised = False
        self._waiting.finish()
        is_over = self._interrupts.received is not None
        if self._is_silent:
            return is_over
        self._add(
            stop.feed("".join(stream.feed(int(t)) for t in row[mask]))
            for stop, stream, row, mask in zip(
                *(self._stops, self._streams, new, inside), strict=True
            )
        )
        return is_over

    def _add(self, texts: Iterable[str]) -> None:
        shown = len(self._texts[0]) if self._begun else 0
        self._texts = [a + b for a, b in zip(self._texts, texts, strict=True)]
        if not self._begun and len(self._texts) > 1:
            print("--- sample 1")
        self._begun = True
        print(for_stdout(self._texts[0][shown:]), end="", flush=True)

    def _finish(self) -> None:
        self._add(
            stop.feed(stream.finish()) + stop.finish()
            for stop, stream in zip(self._stops, self._streams, strict=True)
        )
        print()
        for i, text in enumerate(self._texts[1:], start=2):
            print(f"--- sample {i}\n{for_stdout(text)}")


def print_stats(result: Generation) -> None:
    """Prints the tokens per second, the size of the cache and the guesses to stderr."""
    guessed, right = int(result.num_proposed.sum()), int(result.num_accepted.sum())
    guesses = f", {right} of {guessed} guesses right" if guessed else ""
    old, new = int(result.prefill_tokens.sum()), int(result.lengths.sum())
    print(
        f"prefill {old} tokens in {result.prefill_s:.2f} s "
        f"({old / result.prefill_s:.0f} tokens/s), decode {new} tokens in "
        f"{result.decode_s:.2f} s ({new / result.decode_s:.0f} tokens/s), "
        f"compiling {result.compile_s:.1f} s, "
        f"cache {result.cache_bytes / 2**20:,.3g} MiB{guesses}",
        file=sys.stderr,
    )
