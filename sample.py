"""Continue a text: python sample.py [CHECKPOINT] --prompt ... (else the newest run)"""

import dataclasses
import functools
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import tyro
from jaxtyping import Bool, Int

from jaxlm.checkpoint.load import load, open_checkpoint
from jaxlm.checkpoint.native.saving import find_runs
from jaxlm.cli import fail, parse, use_compile_cache
from jaxlm.config import MeshConfig, SampleConfig
from jaxlm.infer.chat import converse
from jaxlm.infer.generate import Generation, generate
from jaxlm.model.params import init, parameter_shardings
from jaxlm.sharding.mesh import make_mesh
from jaxlm.tokenizers.base import TextStream
from jaxlm.train.stopping import EXIT_INTERRUPTED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continue a text with a trained model."""

    run: tyro.conf.Positional[Path | None] = None
    """A run or step folder, a Hugging Face folder, a .gguf file, or hf:owner/name;
    None takes the newest run below runs/."""
    prompt: str = "\n"
    """Text to continue."""
    chat: bool = False
    """Hold a conversation: lines are read until /exit or the end of the input."""
    system: str | None = None
    """With --chat, what the system message says; None sends none."""
    num_samples: int = 1
    """Continuations, drawn together."""
    seed: int = 0
    """Seed of the draw."""
    stats: bool = False
    """Print tokens per second of prefill and decoding to stderr."""
    dtype: str | None = None
    """Compute dtype (float32, bfloat16); None takes the run's."""
    sample: tyro.conf.OmitArgPrefixes[SampleConfig] = dataclasses.field(
        default_factory=lambda: SampleConfig(temperature=0.8)
    )
    """How tokens are drawn."""
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))
    """Devices to use."""


def main() -> int:
    arguments = parse(Arguments, None, sys.argv[1:], flat=("sample",), prog="sample.py")
    if arguments.num_samples < 1:
        fail(f"--num-samples is {arguments.num_samples}: it must be at least 1")
    if arguments.system is not None and not arguments.chat:
        fail("--system is for conversations: add --chat")
    if arguments.chat and (arguments.num_samples, arguments.prompt) != (1, "\n"):
        fail("--chat reads what to answer: leave out --prompt and --num-samples")
    use_compile_cache()
    try:
        run = arguments.run or newest_run()
        return write_samples(arguments, run)
    except ValueError as error:
        fail(error)
    except KeyboardInterrupt:
        print()
        return EXIT_INTERRUPTED


def newest_run() -> Path:
    runs = find_runs()
    if not runs:
        raise ValueError(
            "no run with a checkpoint below runs/: train one with `python train.py`, "
            "or name a run folder"
        )
    return runs[0]


def write_samples(arguments: Arguments, run: Path) -> int:
    """Loads the model and writes each sample to stdout."""
    checkpoint = open_checkpoint(run)
    model, tokenizer = checkpoint.config, checkpoint.tokenizer()
    if arguments.dtype is not None:
        model = dataclasses.replace(model, dtype=arguments.dtype)
    sizes = dataclasses.asdict(arguments.mesh)
    if any(size < 1 for size in sizes.values()):
        raise ValueError(f"mesh {sizes}: say how many devices each axis has")
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    sample = arguments.sample
    if not sample.stop_ids:
        sample = dataclasses.replace(sample, stop_ids=tokenizer.stop_ids)
    prompt = tokenizer.encode(arguments.prompt)
    if tokenizer.bos_id is not None and (tokenizer.adds_bos or not len(prompt)):
        prompt = np.array([tokenizer.bos_id, *prompt])
    mesh = make_mesh(arguments.mesh, devices)
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    shardings = parameter_shardings(shapes, mesh)
    with jax.set_mesh(mesh):
        _, params = load(checkpoint, shardings=shardings)
        key = jax.random.key(arguments.seed)
        if arguments.chat:
            converse(
                *(model, params, tokenizer, sample, key),
                new_stream=functools.partial(TextStream, tokenizer),
                system=arguments.system,
            )
            return 0
        printer = Printer(tokenizer, arguments.prompt, arguments.num_samples)
        result = generate(
            model,
            params,
            [prompt] * arguments.num_samples,
            sample,
            key,
            num_tokens=tokenizer.vocab_size,
            on_tokens=printer.feed,
        )
        printer.finish()
    if arguments.stats:
        print_stats(result, len(prompt) * arguments.num_samples)
    return 0


class Printer:
    """Writes the first sample as it comes, and the others after it.

    Python drops a KeyboardInterrupt that falls into a callback of the garbage
    collection, so it is raised again at the next tokens.
    """

    def __init__(self, tokenizer, prompt: str, num_samples: int):
        self._interrupted = False
        signal.signal(signal.SIGINT, self._interrupt)
        self._streams = [TextStream(tokenizer) for _ in range(num_samples)]
        self._texts = [prompt] * num_samples
        self._many = num_samples > 1
        if self._many:
            print("--- sample 1")
        print(prompt, end="", flush=True)

    def _interrupt(self, number, frame) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def feed(
        self, new: Int[np.ndarray, "B n"], inside: Bool[np.ndarray, "B n"]
    ) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        for i, stream in enumerate(self._streams):
            text = "".join(stream.feed(int(t)) for t in new[i][inside[i]])
            self._add(i, text)

    def _add(self, i: int, text: str) -> None:
        self._texts[i] += text
        if i == 0:
            print(text, end="", flush=True)

    def finish(self) -> None:
        for i, stream in enumerate(self._streams):
            self._add(i, stream.finish())
        print()
        for i, text in enumerate(self._texts[1:], start=2):
            print(f"--- sample {i}\n{text}")


def print_stats(result: Generation, prompt_tokens: int) -> None:
    drawn = int(result.lengths.sum())
    print(
        f"prefill {prompt_tokens} tokens in {result.prefill_s:.2f} s "
        f"({prompt_tokens / result.prefill_s:.0f} tokens/s), decode {drawn} tokens in "
        f"{result.decode_s:.2f} s ({drawn / result.decode_s:.0f} tokens/s), "
        f"compiling {result.compile_s:.1f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
