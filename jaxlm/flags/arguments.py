"""The arguments of each verb: a dataclass whose fields are its flags.

They are apart from the verbs, so that a wrong flag is reported before JAX is imported.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from jaxlm.config import (
    AttentionName,
    CacheKind,
    MeshConfig,
    SampleConfig,
    WeightKind,
)
from jaxlm.files import beginnings
from jaxlm.flags.config_file import RunArguments, read_config
from jaxlm.flags.flag_table import Flat, Positional
from jaxlm.flags.parse import parse
from jaxlm.report import PICTURE, REPORT

COMPARISON = Path("comparison.html")
"""The page of a report on several runs."""


@dataclass(frozen=True, kw_only=True)
class GenerationArguments:
    """A model, and how tokens are sampled from it."""

    run: Positional[str | None] = None
    """A run or step folder, a Hugging Face folder, a .gguf file, or hf:owner/name;
    without it the newest run below runs/."""
    sample: Flat[SampleConfig] = field(
        default_factory=lambda: SampleConfig(temperature=0.8)
    )
    seed: int = 0
    """Seed of the sampling."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Compute dtype; None keeps the run's."""
    weights: WeightKind = "float"
    """Bits of the matrices: `float` keeps them, `int8` and `int4` take less memory and
    time on accelerators, and change the texts; docs/decoding.md has the loss."""
    cache: CacheKind = "full"
    """How keys and values are kept: `ring` holds the window of layers that have one,
    `int8` and `int4` round them to 8 or 4 bits."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed is {self.seed}: it must be in [0, 2**32)")


@dataclass(frozen=True, kw_only=True)
class SampleArguments(GenerationArguments):
    """Continue a text with a trained model.

    Example: {prog} runs/shakespeare --prompt "ROMEO:"
    """

    prompt: str | None = None
    """Text to continue; None: a line break."""
    prompt_file: Path | None = None
    """File with the text to continue, without its last line break; - reads stdin."""
    num_samples: int = 1
    """Number of continuations, sampled as one batch."""
    best_of: int | None = None
    """Sample this many, and print the --num-samples whose tokens the model finds most
    likely on average."""
    beams: int | None = None
    """Search for the likeliest texts instead of sampling, following this many at once,
    and print the best --num-samples; no rule of sampling is used."""
    length_penalty: float = 1.0
    """With --beams, above 0 favors long texts, below 0 short ones."""
    regex: str | None = None
    """Regular expression that the whole new text matches."""
    json_schema: Path | None = None
    """File with a JSON schema; the new text is a JSON value that it allows."""
    json: bool = False
    """Print each sample as a line of JSON: text, tokens and log-probabilities."""
    top_logprobs: int = 0
    """With --json, also this many of the most likely tokens at each position."""
    show_probs: bool = False
    """Color each new token by the probability that the model gives it."""
    speculate: str | None = None
    """Read several guessed tokens in one pass: `lookup` guesses that the text repeats
    itself, the path of a smaller model with the same tokens lets that guess. The text
    stays the same."""
    stats: bool = False
    """Print the tokens per second of prefill and decoding, the memory of keys and
    values, and how many guesses of --speculate were right, to stderr."""
    look: Path | None = None
    """Also write a page like that of `jaxlm look`, of the first sample."""
    chat: bool = False
    """Hold a conversation instead, with the flags of `jaxlm chat`."""

    def __post_init__(self):
        super().__post_init__()
        _check_at_least_1(self, "num_samples")
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("give --prompt or --prompt-file, not both")
        _check_at_least_1(self, "best_of", "beams")
        self._check_choice()
        if self.regex is not None and self.json_schema is not None:
            raise ValueError("give --regex or --json-schema, not both")
        if self.json and self.show_probs:
            raise ValueError("give --json or --show-probs, not both")
        if self.look is not None:
            _check_page("--look", self.look)
        if self.look is not None and self.weights != "float":
            raise ValueError(
                f"--look reads matrices: leave out --weights {self.weights}"
            )
        if self.top_logprobs < 0 or (self.top_logprobs and not self.json):
            raise ValueError(
                f"--top-logprobs is {self.top_logprobs}: it must be 0 or more, and "
                "needs --json"
            )

    def _check_choice(self) -> None:
        """Checks the flags by which the best of several texts are chosen."""
        if self.best_of is not None and self.beams is not None:
            raise ValueError("give --best-of or --beams, not both")
        for flag, count in (("--best-of", self.best_of), ("--beams", self.beams)):
            if count is not None and count < self.num_samples:
                raise ValueError(
                    f"{flag} is {count}: it must be at least --num-samples, "
                    f"{self.num_samples}"
                )
        if self.beams is None:
            return
        absent = {
            **self._rules(),
            "--regex": self.regex,
            "--json-schema": self.json_schema,
            "--show-probs": self.show_probs,
            "--top-logprobs": self.top_logprobs,
            "--speculate": self.speculate,
            "--stats": self.stats,
            "--look": self.look,
        }
        for flag in (flag for flag, value in absent.items() if value):
            raise ValueError(f"--beams searches without {flag}: leave one out")

    def _rules(self) -> dict[str, bool]:
        """Returns the flag of each rule of sampling, and whether it is asked for."""
        default = GenerationArguments().sample
        names = [f.name for f in fields(SampleConfig)]
        return {
            f"--{name.replace('_', '-')}": getattr(self.sample, name)
            != getattr(default, name)
            for name in names
            if name not in ("max_new_tokens", "stop_ids")
        }


@dataclass(frozen=True, kw_only=True)
class ChatArguments(GenerationArguments):
    """Hold a conversation with a model that was trained to chat.

    Example: {prog} model.gguf --system "Answer in one sentence."
    """

    sample: Flat[SampleConfig] = field(
        default_factory=lambda: SampleConfig(temperature=0.8, max_new_tokens=1024)
    )
    system: str | None = None
    """Content of the system message; None sends none."""


@dataclass(frozen=True, kw_only=True)
class LookArguments:
    """Look inside a model while it reads a text: a page that opens without a network.

    Example: {prog} runs/shakespeare --prompt "ROMEO:" -o inside.html
    """

    run: Positional[str | None] = None
    """A run or step folder, a Hugging Face folder, a .gguf file, or hf:owner/name;
    without it the newest run below runs/."""
    prompt: str = ""
    """The text, of up to 128 tokens."""
    against: str | None = None
    """Another text of as many tokens, whose inner values are put into this one."""
    lens: Path | None = None
    """File of a Jacobian lens of this model, to show beside the logit lens."""
    lens_text: Path | None = None
    """Text file: make the lens from its beginning first, and write it to --lens."""
    out: Path = Path("inside.html")
    """HTML file."""
    terminal: bool = False
    """Print it here instead, in short."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = "float32"
    """Compute dtype; float32 rounds least. None keeps the run's."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))

    def __post_init__(self):
        if not self.prompt:
            raise ValueError('--prompt is missing: give a text, --prompt "ROMEO:"')
        if self.lens_text is not None and self.lens is None:
            raise ValueError("--lens-text needs --lens, the file to write the lens to")
        if self.lens is not None and self.lens_text is not None:
            _check_outside_steps("--lens", self.lens)
        _check_page("--out", self.out)


def _check_outside_steps(what: str, path: Path) -> None:
    """Keeps a file to write from the files of a step, which would be damaged."""
    for folder in Path(os.path.realpath(path)).parents:
        if all((folder / name).is_file() for name in ("meta.json", "manifest.json")):
            raise ValueError(
                f"{what} {path} is inside of a step, which would be damaged: choose "
                "another folder"
            )


def _check_page(flag: str, path: Path) -> None:
    """Keeps a page from replacing anything but a page of this package."""
    _check_written(flag, path, "a page", (".html", ".htm"), beginnings.PAGE)


def _check_written(
    flag: str, path: Path, kind: str, endings: Sequence[str], beginning: bytes
) -> None:
    """Keeps a file from replacing what is not of its kind: a log, weights, notes."""
    _check_outside_steps(flag, path)
    if path.suffix.lower() not in endings:
        raise ValueError(f"{flag} {path}: the name of {kind} ends in {endings[0]}")
    if not beginnings.begins(path, beginning):
        raise ValueError(
            f"{flag} {path} is there, and is not {kind} of jaxlm: choose another name, "
            "or remove it"
        )


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """Convert a checkpoint to another format: jaxlm, Hugging Face or GGUF.

    Example: {prog} runs/shakespeare shakespeare.gguf
    """

    src: Positional[str]
    """A run, a Hugging Face folder, a .gguf file, or hf:owner/name."""
    dst: Positional[Path]
    """The new folder or .gguf file."""
    to: Literal["jaxlm", "hf", "gguf"] | None = None
    """The format; None: gguf if DST ends in .gguf, else hf for a run, else jaxlm."""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Dtype of the parameters; None keeps the stored one (f16 in GGUF)."""
    tokenizer: bool = True
    """Also write the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Compare a model with transformers or its recorded values, and with itself.

    Example: {prog} runs/shakespeare
    """

    src: Positional[str]
    """A run, a Hugging Face folder, a .gguf file, or hf:owner/name."""
    against: str | None = None
    """A Hugging Face folder or .gguf file for transformers to read, or a certificate
    (.json) of another copy; None: SRC in transformers, else SRC's own certificate."""
    tokens: int = 512
    """Length of the text, at most the model's context."""
    out: Path | None = None
    """Path of the certificate; None: beside the checkpoint."""

    def __post_init__(self):
        if self.out is None:
            return
        if not self.out.parent.is_dir():
            raise ValueError(
                f"--out {self.out}: {self.out.parent} is not a folder; make it first"
            )
        if self.out.is_dir():
            raise ValueError(
                f"--out {self.out} is a folder: give a file, as "
                f"{self.out / 'certificate.json'}"
            )
        kind = "a certificate", (".json",), beginnings.CERTIFICATE
        _check_written("--out", self.out, *kind)


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Measure how well a model predicts texts, or answers multiple choice.

    Example: {prog} runs/shakespeare --text held-out.txt
    """

    src: Positional[str]
    """A run or step folder, a Hugging Face folder, a .gguf file, or hf:owner/name."""
    text: str | None = None
    """Text to predict: a file, a folder, a glob or bundled:NAME; of JSON lines and
    Parquet the field `text`."""
    choices: Path | None = None
    """Multiple-choice questions: a file of JSON lines, or bundled:knowledge,
    bundled:sense or bundled:grammar; docs/evaluation.md has the format."""
    context: int | None = None
    """Tokens that a window of the text holds; None: the model's context."""
    stride: int | None = None
    """New tokens of each window after the first; None: half the context."""
    json: bool = False
    """Print the figures as a line of JSON."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Compute dtype; None keeps the run's."""
    weights: WeightKind = "float"
    """Bits of the matrices: `float` keeps them, `int8` and `int4` take less memory and
    time on accelerators, and change the texts; docs/decoding.md has the loss."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))

    def __post_init__(self):
        if (self.text is None) == (self.choices is None):
            raise ValueError("give --text or --choices")
        if self.text is None and (self.context or self.stride):
            raise ValueError("--context and --stride need --text")


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """Answer requests over HTTP, as OpenAI's API does.

    Example: {prog} model.gguf --port 8000
    """

    src: Positional[str]
    """A run or step folder, a Hugging Face folder, a .gguf file, or hf:owner/name."""
    host: str = "127.0.0.1"
    """Address to listen at; another than this machine's own needs an API key."""
    port: int = 8000
    """Port to listen at."""
    name: str | None = None
    """Name of the model for clients; None: that of its file or folder."""
    api_key: str | None = None
    """What clients must send; None: JAXLM_API_KEY of the environment, if it is set."""
    slots: int = 8
    """Answers that are computed at once, at most 1024; others wait."""
    max_length: int | None = None
    """Tokens of a prompt and its answer together; None: the model's context."""
    max_requests: int = 64
    """Answers that run or wait at once; more are refused."""
    max_seconds: int = 600
    """Time for an answer, waiting included."""
    speculate: str | None = None
    """As for `jaxlm sample`: `lookup`, or the path of a smaller model."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """Compute dtype; None keeps the run's."""
    weights: WeightKind = "float"
    """Bits of the matrices: `float` keeps them, `int8` and `int4` take less memory and
    time on accelerators, and change the texts; docs/decoding.md has the loss."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))

    def __post_init__(self):
        names = ("slots", "max_length", "max_requests", "max_seconds", "port")
        _check_at_least_1(self, *names)
        if self.port > 65_535:
            raise ValueError(f"--port is {self.port}: it must be at most 65535")
        if self.slots > 1024:
            raise ValueError(f"--slots is {self.slots}: it must be at most 1024")


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Plot one run, or compare several: an HTML page and a PNG.

    Example: {prog} runs/first runs/second --out comparison.html
    """

    runs: Positional[tuple[Path, ...]] = ()
    """Run folders."""
    out: Path | None = None
    """HTML file; None: report.html in the run, or comparison.html for several."""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("RUNS is missing: name at least one run folder")
        page, picture = self.files()
        _check_page("--out" if self.out else "the report", page)
        is_alone = picture.exists() and not page.exists()
        if not beginnings.begins(picture, beginnings.PICTURE) or (
            is_alone and picture.name != PICTURE
        ):
            raise ValueError(
                f"{picture} is there, and the picture beside {page} would replace it: "
                "choose another --out, or remove it"
            )

    def files(self) -> tuple[Path, Path]:
        """Returns the page and the picture to write."""
        if self.out is None and len(self.runs) == 1:
            return self.runs[0] / REPORT, self.runs[0] / PICTURE
        page = self.out or COMPARISON
        return page, page.with_suffix(".png")


@dataclass(frozen=True, kw_only=True)
class TuneArguments:
    """Measure block sizes of attention on this device, and save the best.

    Example: {prog} attention --length 4096 --head-dim 128
    """

    what: Positional[Literal["attention"]]
    """What to tune: attention."""
    implementation: AttentionName | None = None
    """Name of one; None: all that have block sizes and run here."""
    batch: int = 4
    """Rows."""
    length: int = 1024
    """Tokens per row."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 2
    """Key/value heads."""
    head_dim: int = 64
    """Width of a head."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 where the device multiplies it natively."""
    window: int | None = None
    """Tokens that a query attends to; None: all before it."""

    def __post_init__(self):
        sizes = ("batch", "length", "heads", "kv_heads", "head_dim", "window")
        _check_at_least_1(self, *sizes)


def _check_at_least_1(arguments: Any, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is {value}: it must be at least 1")


ARGUMENTS = {
    "train": RunArguments,
    "sample": SampleArguments,
    "chat": ChatArguments,
    "look": LookArguments,
    "convert": ConvertArguments,
    "verify": VerifyArguments,
    "eval": EvalArguments,
    "serve": ServeArguments,
    "report": ReportArguments,
    "tune": TuneArguments,
    "doctor": RunArguments,
}
_FIRST = (
    *("prompt", "prompt_file", "against", "out", "terminal", "system"),
    *("sample.max_new_tokens",),
    *("sample.temperature", "sample.top_k", "sample.top_p", "sample.min_p"),
    *("sample.stop_strings", "num_samples", "seed", "json", "show_probs", "stats"),
    *("dtype", "chat"),
)


def read_arguments(verb: str, arguments: Sequence[str], prog: str) -> tuple[Any, ...]:
    """Parses the command line of a verb into what its `main` is called with.

    Raises:
      ValueError: if an argument is wrong.
    """
    kind = ARGUMENTS[verb]
    if kind is RunArguments:
        return read_config(arguments, prog=prog)
    return (parse(kind, arguments, prog=prog, first=_FIRST),)
