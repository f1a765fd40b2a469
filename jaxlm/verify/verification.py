"""`jaxlm verify`: checks that a model computes what it should.

`comparing.py` has the comparisons and their gates, `find_reference.py` finds the
reference, and `hard_texts.py` checks the tokenizer. Everything runs in float32.
"""

import dataclasses
import datetime
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jaxlm import tree
from jaxlm.checkpoint import certificate
from jaxlm.checkpoint.load import open_checkpoint
from jaxlm.checkpoint.opened import Checkpoint, print_to_stderr
from jaxlm.config import ModelConfig
from jaxlm.data.sources import BUNDLED_FOLDER
from jaxlm.model.params import weights
from jaxlm.tokenizers.base import Tokenizer
from jaxlm.verify import comparing
from jaxlm.verify.check import Check, table
from jaxlm.verify.find_reference import Reference, Subject, find_reference
from jaxlm.verify.hard_texts import check_ids, check_round_trip

# Longer than the windows and unscaled lengths of many models, and short enough for the
# eager attention of the reference.
NUM_TOKENS = 512
_TEXT = BUNDLED_FOLDER / "shakespeare.txt"
# Characters to read per token; runs of white space make long tokens.
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True, eq=False)
class Verification:
    """The result for a model; `model` and `text` describe what was compared."""

    checkpoint: Checkpoint
    model: str
    text: str
    reference: Reference
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check that was made passed."""
        return all(check.passed is not False for check in self.checks)

    @property
    def summary(self) -> str:
        """One line for `load` to report."""
        expected = self.reference.expected
        against = "without an independent implementation"
        if expected is not None:
            against = f"against {expected.name}"
        if failed := [c.name for c in self.checks if c.passed is False]:
            found = f"past the gate: {'; '.join(failed)}"
        else:
            found = ", ".join(
                f"{_SHORT[c.name]} {c.measured.split(',')[0]}"
                for c in self.checks
                if c.name in _SHORT and c.passed
            )
        return f"{against}: {found} ({datetime.date.today().isoformat()})"

    def __str__(self) -> str:
        """Formats the table."""
        count = len([c for c in self.checks if c.passed is False])
        verdict = "passed" if self.passed else f"FAILED, {count} past the gate"
        if self.reference.expected is None:
            verdict += ", but without an independent implementation"
        against = "against " if self.reference.expected else ""
        about = against + self.reference.about
        head = [str(self.checkpoint.path), self.model, self.text, about]
        return "\n".join([*head, "", table(self.checks), "", verdict])

    def findings(self) -> dict[str, Any]:
        """Returns the content of a certificate."""
        expected = self.reference.expected
        versions = {"jaxlm": version("jaxlm"), "jax": jax.__version__}
        return {
            "passed": self.passed,
            "summary": self.summary,
            "model": self.model,
            "text": self.text,
            "against": self.reference.about,
            "checks": [check.to_json() for check in self.checks],
            "versions": versions | dict(expected.versions if expected else {}),
            "reference": None if expected is None else expected.to_json(),
        }


def verify(
    src: str | Path,
    *,
    against: str | Path | None = None,
    num_tokens: int = NUM_TOKENS,
    report: Callable[[str], None] = print_to_stderr,
) -> Verification:
    """Compares a model with an independent implementation, and with itself.

    Args:
      src: as `jaxlm.load`.
      against: the reference, as in `find_reference`; None takes the best available.
      num_tokens: length of the text, limited by the model's context.
      report: gets a line for each phase.

    Raises:
      ValueError: if the model or the requested reference cannot be read, or there is
        not enough memory.
    """
    if num_tokens < 1:
        raise ValueError(f"--tokens is {num_tokens}: it must be at least 1")
    began = time.monotonic()

    def phase(line: str) -> None:
        report(f"[{time.monotonic() - began:5.1f} s] {line}")

    checkpoint = open_checkpoint(src, report=report)
    config = dataclasses.replace(checkpoint.config, dtype="float32")
    _check_memory(config, num_tokens)
    tokenizer, why_not = _tokenizer(checkpoint)
    tokens, text = _text(config, tokenizer, num_tokens)
    with jax.default_matmul_precision("highest"):
        phase(f"reading {checkpoint.path}")
        params = checkpoint.params(dtype=jnp.float32)
        subject = Subject(checkpoint, config, params, tokenizer, tokens)
        reference = find_reference(subject, against, phase)
        checks = _check_tokenizer(tokenizer, why_not, config, reference)
        checks += _check_model(subject, reference, phase)
    expected = reference.expected
    if expected is not None and expected.tokens is not tokens:
        text = f"{len(expected.tokens)} tokens stored with the reference"
    phase("done")
    model = f"{checkpoint.kind}, {config.num_layers} layers, "
    model += f"{tree.count(params) / 1e6:.1f}M parameters, computed in float32 on "
    model += jax.local_devices()[0].device_kind
    return Verification(checkpoint, model, text, reference, tuple(checks))


def write_certificate(verification: Verification, out: Path | None = None) -> str:
    """Writes certificate.json beside the checkpoint, or to another file.

    Returns:
      A line with the path, or the reason why it was not written.
    """
    try:
        file = certificate.write(verification.checkpoint, verification.findings(), out)
    except OSError as error:
        return f"no certificate: {error.filename}: {error.strerror} (--out FILE)"
    return f"certificate: {file}"


def _tokenizer(checkpoint: Checkpoint) -> tuple[Tokenizer | None, str]:
    """Returns the tokenizer, or None and the reason."""
    try:
        return checkpoint.tokenizer(), ""
    except ValueError as error:
        return None, str(error)


def _text(
    config: ModelConfig, tokenizer: Tokenizer | None, num_tokens: int
) -> tuple[Int32[np.ndarray, "T"], str]:
    """Returns the token ids to compare on, the same in each call, and a description."""
    length = min(num_tokens, config.context_length)
    tokens = None
    if tokenizer is not None:
        tokens = _bundled(config, tokenizer, length)
    what = "of the bundled text"
    if tokens is None:
        draw = np.random.default_rng(0)
        tokens = draw.integers(0, config.vocab_size, length).astype(np.int32)
        what = "drawn at random"
    line = f"{len(tokens)} tokens {what}"
    scaling = config.rope_scaling
    reach = {
        "window": config.window or 0,
        "unscaled length": scaling.original_context_length if scaling else 0,
    }
    for name, size in reach.items():
        if size >= len(tokens):
            line += f"; the {name} of {size} is not reached (--tokens {2 * size})"
    return tokens, line


def _bundled(
    config: ModelConfig, tokenizer: Tokenizer, length: int
) -> Int32[np.ndarray, "T"] | None:
    """Encodes the start of the bundled text; None if the tokenizer cannot."""
    with _TEXT.open(encoding="utf-8") as file:
        text = file.read(_CHARACTERS_PER_TOKEN * length)
    try:
        ids = tokenizer.encode(text)
    except ValueError:
        return None
    if tokenizer.adds_bos:
        ids = np.concatenate([[tokenizer.bos_id], ids])
    ids = ids[:length].astype(np.int32)
    return ids if ids.size and ids.max() < config.vocab_size else None


def _check_tokenizer(
    tokenizer: Tokenizer | None, why_not: str, config: ModelConfig, reference: Reference
) -> list[Check]:
    if tokenizer is None:
        return [Check("tokenizer", "none", "", None, why_not)]
    checks = check_round_trip(tokenizer, config.vocab_size)
    expected = reference.expected
    if expected is not None and expected.texts:
        checks += check_ids(tokenizer, expected)
    else:
        note = expected.texts_how if expected else ""
        checks.append(Check("tokenizer, ids", "-", "all", None, note))
    return checks


def _check_model(
    subject: Subject, reference: Reference, phase: Callable[[str], None]
) -> list[Check]:
    config, params, tokens = subject.config, subject.params, subject.tokens
    expected = reference.expected
    if expected is not None:
        tokens = expected.tokens
    phase(f"jaxlm: {len(tokens)} tokens")
    ours = comparing.full_pass(config, params, tokens)
    if not (np.isfinite(ours.logits).all() and np.isfinite(ours.residual).all()):
        note = "the parameters hold NaN or infinities, or float32 overflows"
        return [Check("all numbers are finite", "no", "yes", False, note)]
    if expected is None:
        names = (comparing.FIRST_LAYER, comparing.LARGEST, comparing.DIVERGENCE)
        checks = [Check(n, "-", "", None) for n in (*names, comparing.GREEDY)]
    else:
        checks = comparing.compare_with(expected, config, ours)
        phase("jaxlm: greedy tokens")
        checks.append(comparing.compare_greedy(expected, config, params))
    phase("jaxlm: decoding with a cache")
    checks.append(comparing.check_decoding(config, params, tokens, ours))
    phase("jaxlm: rows of a batch")
    checks.append(comparing.check_rows(config, params, tokens, ours))
    return checks


def _check_memory(config: ModelConfig, num_tokens: int) -> None:
    """Raises ValueError if two copies of the model do not fit into memory."""
    count = sum(math.prod(w.shape(config)) for w in weights(config).values())
    length = min(num_tokens, config.context_length)
    # Our weights and theirs (or two copies of ours for decoding), and activations.
    values = length * (config.vocab_size + config.num_layers * config.model_dim)
    needed = 4 * (2 * count + 4 * values)
    available = _available_memory()
    if available is not None and needed > available:
        raise ValueError(
            f"to verify {count / 1e9:.1f}B parameters takes {needed / 1e9:.1f} GB "
            f"(float32, twice), but {available / 1e9:.1f} GB of memory are free: use a "
            "machine with more"
        )


def _available_memory() -> int | None:
    """Returns the bytes available without swapping; None if not on Linux."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


# Rows that the summary mentions -> their words there.
_SHORT = {
    comparing.LARGEST: "logits within",
    comparing.DIVERGENCE: "KL",
    comparing.GREEDY: "greedy tokens",
    comparing.DECODING: "decoding with a cache within",
}
