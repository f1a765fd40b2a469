"""Continue a text with a trained model."""

import dataclasses
import signal
import sys
from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxlm.checkpoint.load import load_onto_mesh, open_checkpoint
from jaxlm.checkpoint.native.run_folder import newest_run
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.commands.arguments import SampleArguments
from jaxlm.commands.process import use_compile_cache
from jaxlm.config import ModelConfig, SampleConfig
from jaxlm.infer.generate import Generation, generate
from jaxlm.sharding.mesh import make_mesh_of_size
from jaxlm.tokenizers.base import TextStream, Tokenizer
from jaxlm.types import Params


def main(chosen: SampleArguments) -> int:
    """Opens the checkpoint and continues the prompt; returns the exit code."""
    use_compile_cache()
    sample(open_checkpoint(chosen.run or newest_run()), chosen)
    return 0


def sample(checkpoint: Checkpoint, chosen: SampleArguments) -> None:
    """Continues the prompt on the devices requested."""
    model, tokenizer = checkpoint.config, checkpoint.tokenizer()
    if chosen.dtype is not None:
        model = dataclasses.replace(model, dtype=chosen.dtype)
    sample_config = chosen.sample
    if not sample_config.stop_ids:
        sample_config = dataclasses.replace(sample_config, stop_ids=tokenizer.stop_ids)
    key = jax.random.key(chosen.seed)
    with jax.set_mesh(make_mesh_of_size(chosen.mesh)):
        params = load_onto_mesh(checkpoint)
        write_samples(model, params, tokenizer, sample_config, key, chosen)


def write_samples(
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    sample_config: SampleConfig,
    key: jax.Array,
    chosen: SampleArguments,
) -> None:
    """Samples the continuations and writes them to stdout, streaming the first."""
    prompt = tokenizer.encode(chosen.prompt)
    if tokenizer.bos_id is not None and (tokenizer.adds_bos or not len(prompt)):
        prompt = np.array([tokenizer.bos_id, *prompt])
    with Printer(tokenizer, chosen.prompt, chosen.num_samples) as printer:
        result = generate(
            model,
            params,
            [prompt] * chosen.num_samples,
            sample_config,
            key,
            num_tokens=tokenizer.vocab_size,
            on_tokens=printer.feed,
        )
    if chosen.stats:
        print_stats(result, len(prompt) * chosen.num_samples)


class Printer:
    """Streams the first sample to stdout, and prints the others after it.

    The prompt is printed with the first new tokens, so log lines don't split prompt and
    text, and a rejected prompt isn't printed.

    Python drops a KeyboardInterrupt that is raised in a callback of the garbage
    collector, so it is raised again at the next tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, num_samples: int):
        self._interrupted = False
        self._begun = False
        self._streams = [TextStream(tokenizer) for _ in range(num_samples)]
        self._texts = [prompt] * num_samples

    def __enter__(self) -> "Printer":
        self._old_handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._old_handler)
        if kind is None:
            self._finish()
        elif self._begun:
            print(flush=True)

    def _interrupt(self, number, frame) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def feed(
        self, new: Int[np.ndarray, "B n"], inside: Bool[np.ndarray, "B n"]
    ) -> None:
        """Adds new tokens of each sample; `inside` masks those that are text."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._add(
            "".join(stream.feed(int(t)) for t in row[mask])
            for stream, row, mask in zip(self._streams, new, inside, strict=True)
        )

    def _add(self, texts: Iterable[str]) -> None:
        shown = len(self._texts[0]) if self._begun else 0
        self._texts = [a + b for a, b in zip(self._texts, texts, strict=True)]
        if not self._begun and len(self._texts) > 1:
            print("--- sample 1")
        self._begun = True
        print(self._texts[0][shown:], end="", flush=True)

    def _finish(self) -> None:
        self._add(stream.finish() for stream in self._streams)
        print()
        for i, text in enumerate(self._texts[1:], start=2):
            print(f"--- sample {i}\n{text}")


def print_stats(result: Generation, prompt_tokens: int) -> None:
    """Prints the tokens per second to stderr."""
    new = int(result.lengths.sum())
    print(
        f"prefill {prompt_tokens} tokens in {result.prefill_s:.2f} s "
        f"({prompt_tokens / result.prefill_s:.0f} tokens/s), decode {new} tokens in "
        f"{result.decode_s:.2f} s ({new / result.decode_s:.0f} tokens/s), "
        f"compiling {result.compile_s:.1f} s",
        file=sys.stderr,
    )
