"""Continue a text with a trained model, or hold a conversation with it."""

import dataclasses
import logging
import math
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import tyro
from jaxtyping import Bool, Int

from jaxlm.checkpoint.load import load, open_checkpoint
from jaxlm.checkpoint.native.run_folder import find_runs
from jaxlm.checkpoint.opened import Checkpoint
from jaxlm.commands.process import log_paused, use_compile_cache
from jaxlm.config import MeshConfig, ModelConfig, SampleConfig
from jaxlm.flags import fail, parse
from jaxlm.infer.chat import converse
from jaxlm.infer.generate import Generation, generate
from jaxlm.model.attention_choice import attention_choices
from jaxlm.model.params import init, parameter_shardings
from jaxlm.sharding.mesh import make_mesh
from jaxlm.tokenizers.base import TextStream, Tokenizer
from jaxlm.types import Params

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continue a text with a trained model."""

    run: tyro.conf.Positional[Path | None] = None
    """A run or step folder, a Hugging Face folder, a .gguf file, or hf:owner/name;
    None takes the newest run below runs/."""
    prompt: str = "\n"
    """Text to continue."""
    chat: bool = False
    """Hold a conversation: read lines until /exit or the end of the input."""
    system: str | None = None
    """With --chat, the content of the system message; None sends none."""
    num_samples: int = 1
    """Number of continuations, sampled as one batch."""
    seed: int = 0
    """Seed of the sampling."""
    stats: bool = False
    """Print the tokens per second of prefill and decoding to stderr."""
    dtype: str | None = None
    """Compute dtype (float32, bfloat16); None keeps the run's."""
    sample: tyro.conf.OmitArgPrefixes[SampleConfig] = field(
        default_factory=lambda: SampleConfig(temperature=0.8)
    )
    """How tokens are sampled."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    """Devices to use."""


def main(arguments: Sequence[str], prog: str) -> int:
    """`[CHECKPOINT] [--prompt TEXT | --chat] ...`; returns the exit code."""
    chosen = read_arguments(arguments, prog)
    use_compile_cache()
    sample(open_checkpoint(chosen.run or newest_run()), chosen)
    return 0


def sample(checkpoint: Checkpoint, chosen: Arguments) -> None:
    """Continues the prompt or holds the conversation, on the devices requested."""
    model, tokenizer = checkpoint.config, checkpoint.tokenizer()
    if chosen.dtype is not None:
        model = dataclasses.replace(model, dtype=chosen.dtype)
    sample_config = chosen.sample
    if not sample_config.stop_ids:
        sample_config = dataclasses.replace(sample_config, stop_ids=tokenizer.stop_ids)
    key = jax.random.key(chosen.seed)
    with jax.set_mesh(mesh_of(chosen.mesh)):
        params = read_params(checkpoint)
        if not chosen.chat:
            write_samples(model, params, tokenizer, sample_config, key, chosen)
            return
        log_attention(model)
        with log_paused():
            converse(
                model,
                params,
                tokenizer,
                sample_config,
                key,
                system=chosen.system,
            )


def read_arguments(arguments: Sequence[str], prog: str) -> Arguments:
    """Parses the flags; exits with code 2 if they contradict each other."""
    chosen = parse(Arguments, arguments, flat=("sample",), prog=prog)
    if chosen.num_samples < 1:
        fail(f"--num-samples is {chosen.num_samples}: it must be at least 1")
    if chosen.system is not None and not chosen.chat:
        fail("--system is for conversations: add --chat")
    default = Arguments()
    if chosen.chat and (chosen.num_samples, chosen.prompt) != (
        default.num_samples,
        default.prompt,
    ):
        fail(
            "--chat reads its prompts from stdin: leave out --prompt and --num-samples"
        )
    return chosen


def newest_run() -> Path:
    """Returns the run below runs/ that was saved last.

    Raises:
      ValueError: if there is none.
    """
    runs = find_runs()
    if not runs:
        raise ValueError(
            "no run with a checkpoint below runs/: train one with `python train.py` "
            "(or `jaxlm train`), or name a run folder"
        )
    return runs[0]


def mesh_of(config: MeshConfig) -> jax.sharding.Mesh:
    """Makes a mesh of as many devices as the flags name.

    Raises:
      ValueError: if an axis has no size, or there are too few devices.
    """
    sizes = dataclasses.asdict(config)
    if any(size < 1 for size in sizes.values()):
        raise ValueError(f"mesh {sizes}: give each axis its number of devices")
    return make_mesh(config, jax.devices()[: math.prod(sizes.values())])


def read_params(checkpoint: Checkpoint) -> Params:
    """Loads the parameters directly onto their devices."""
    shapes = jax.eval_shape(lambda: init(checkpoint.config, jax.random.key(0)))
    shardings = parameter_shardings(shapes, jax.sharding.get_mesh())
    _, params = load(checkpoint, shardings=shardings)
    return params


def log_attention(model: ModelConfig) -> None:
    """Logs the attention choice before the chat starts, so it doesn't interrupt it."""
    context = model.context_length
    for name, num_queries in (("prefill", context), ("decode", 1)):
        for kind, choice in attention_choices(model, 1, num_queries, context).items():
            logger.info("attention of %s layers, %s: %s", kind, name, choice)
            if choice.warning is not None:
                logger.warning("attention, %s: %s", name, choice.warning)


def write_samples(
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    sample_config: SampleConfig,
    key: jax.Array,
    chosen: Arguments,
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
