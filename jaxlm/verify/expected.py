"""The values that another implementation computes for a model: all, or a sample.

`observe` runs an installed implementation. `Expected.sample` selects a few thousand of
its numbers for a certificate, so that machines without that implementation can compare
with it too.
"""

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int, Int32

from jaxlm.fields import MAX_FLOAT

# A sample keeps the logits of the TOP likeliest tokens after each of ROWS tokens of the
# text, and DIMS numbers of the residual stream at each of these tokens and stages.
ROWS = 16
TOP = 20
DIMS = 4
_MAX_TOKENS = 1 << 20
_MAX_NUMBERS = 1 << 24


@runtime_checkable
class ReferenceModel(Protocol):
    """An implementation that has loaded a model."""

    name: str
    """Its name and version."""

    def run(
        self, tokens: Int[np.ndarray, "T"]
    ) -> tuple[Float[np.ndarray, "T V"], Float[np.ndarray, "S T D"]]:
        """Returns logits and the residual stream: embeddings, then after each layer."""
        ...


@dataclass(frozen=True)
class TextIds:
    """A text, its ids without special tokens, and the text that they decode to."""

    text: str
    ids: tuple[int, ...]
    decoded: str


@dataclass(frozen=True, eq=False)
class Expected:
    """Values of a reference, float32 on the host. S stages: embeddings and layers."""

    name: str
    """Name and version of the implementation."""
    how: str
    """What it read, as a clause: "read the same files itself"."""
    made: str
    """The date, as 2026-11-24."""
    versions: Mapping[str, str]
    """Versions of its libraries."""
    model_dim: int
    """Width of the model."""
    vocab_size: int
    """Number of logits of the model."""
    tokens: Int32[np.ndarray, "T"]
    """The text."""
    rows: Int32[np.ndarray, "P"]
    """Positions whose logits are given."""
    ids: Int32[np.ndarray, "P k"] | None
    """Tokens whose logits are given: those with the largest; None: all V in order."""
    logits: Float32[np.ndarray, "P k"]
    """Logits of `ids`."""
    log_sums: Float32[np.ndarray, "P"]
    """Log-sum-exp over all V logits."""
    logit_spread: float
    """Standard deviation of the logits of all rows."""
    places: Int32[np.ndarray, "M 2"] | None
    """(position, dimension) of the numbers in `residual`; None: all, in order."""
    residual: Float32[np.ndarray, "S *_"]
    """Residual stream: [S, T, D], or [S, M] at `places`."""
    spreads: Float32[np.ndarray, "S"]
    """Standard deviation of the residual stream at each stage."""
    prompt_length: int
    """Number of tokens of the text that the greedy tokens continue."""
    greedy: Int32[np.ndarray, "N"]
    """Greedy continuation of the prompt."""
    gaps: Float32[np.ndarray, "N"]
    """Logit of each greedy token, minus that of the second likeliest."""
    texts: tuple[TextIds, ...] = ()
    """Texts encoded by its tokenizer; empty without one."""
    first_ids: tuple[int, ...] | None = None
    """Ids that its tokenizer puts before a text; None: unknown."""
    texts_how: str = ""
    """What its tokenizer read, as in `how`."""

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""
        return len(self.residual) - 1

    def sample(self) -> "Expected":
        """Selects a few thousand numbers across the text; a sample returns itself."""
        if self.ids is not None:
            return self
        assert self.places is None
        T, D = self.residual.shape[1:]
        rows = np.unique(np.linspace(0, T - 1, min(ROWS, T)).round()).astype(np.int32)
        logits = self.logits[rows]
        top = min(TOP, logits.shape[1])
        ids = np.argsort(-logits, axis=1, kind="stable")[:, :top].astype(np.int32)
        draw = np.random.default_rng(0)
        dims = [draw.choice(D, min(DIMS, D), replace=False) for _ in rows]
        places = [(t, d) for t, row in zip(rows, dims, strict=True) for d in row]
        at = np.array(places, np.int32)
        return dataclasses.replace(
            self,
            rows=rows,
            ids=ids,
            logits=np.take_along_axis(logits, ids, axis=1),
            log_sums=self.log_sums[rows],
            places=at,
            residual=np.ascontiguousarray(self.residual[:, at[:, 0], at[:, 1]]),
        )

    def to_json(self) -> dict[str, Any]:
        """Converts `sample()` to plain values; floats are read back exactly."""
        values = dataclasses.asdict(self.sample())
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype != np.float32:
            return value.tolist()
        # Nine digits identify any float32.
        shortest = [float(f"{x:.9g}") for x in value.reshape(-1)]
        return np.array(shortest).reshape(value.shape).tolist()
    return value


def from_json(values: Any) -> Expected:
    """Inverts `Expected.to_json`.

    Raises:
      ValueError: if a field is missing or broken, with its name, or if fields do not
        match each other.
    """
    if not isinstance(values, dict):
        raise ValueError("its reference is not a JSON object")
    if missing := sorted(_READERS.keys() - values.keys()):
        raise ValueError(f"its reference lacks {', '.join(missing)}")
    x: dict[str, Any] = {}
    for name, read in _READERS.items():
        try:
            x[name] = read(values[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(f"{name} of its reference is broken") from None
    arrays = [v for v in x.values() if isinstance(v, np.ndarray)]
    T, rows, places = len(x["tokens"]), x["rows"], x["places"]
    fits = (
        0 < T <= _MAX_TOKENS
        and 0 < len(rows) == len(x["ids"]) == len(x["log_sums"])
        and x["logits"].shape == x["ids"].shape
        and len(places) > 0
        and places.shape[1] == 2
        and x["residual"].shape == (len(x["spreads"]), len(places))
        and len(x["spreads"]) > 1
        and len(x["greedy"]) == len(x["gaps"])
        and 0 < x["prompt_length"] <= T
        and max(rows.max(), places[:, 0].max()) < T
        and places[:, 1].max() < x["model_dim"]
        and max(x[n].max(initial=0) for n in ("tokens", "ids", "greedy"))
        < x["vocab_size"]
        and min(v.min() for v in arrays if v.dtype == np.int32 and v.size) >= 0
    )
    if not fits:
        raise ValueError("the numbers of its reference do not match each other")
    return Expected(**x)


def _array(values: Any, dtype: Any, ndim: int) -> np.ndarray:
    x = np.asarray(values)
    whole = np.issubdtype(x.dtype, np.integer)
    good = whole or (dtype == np.float32 and np.issubdtype(x.dtype, np.floating))
    if x.ndim != ndim or not good or x.size > _MAX_NUMBERS:
        raise ValueError
    if not (np.abs(x) <= MAX_FLOAT).all():
        raise ValueError
    if whole and x.size and max(-int(x.min()), int(x.max())) >= 1 << 31:
        raise ValueError
    return x.astype(dtype)


def _text(text: Any) -> str:
    # It is printed on a terminal, and files come from strangers.
    if not isinstance(text, str) or not text.isprintable() or len(text) > 300:
        raise ValueError
    return text


def _versions(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or len(values) > 50:
        raise ValueError
    return {_text(name): _text(version) for name, version in values.items()}


def _text_ids(values: Any) -> tuple[TextIds, ...]:
    return tuple(
        TextIds(str(v["text"]), tuple(map(int, v["ids"])), str(v["decoded"]))
        for v in values
    )


# What reads each field of a sample; anything but the right kind of value raises.
_READERS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("name", "how", "made", "texts_how"), _text),
    "versions": _versions,
    **dict.fromkeys(
        ("model_dim", "vocab_size", "prompt_length"),
        lambda value: int(_array(value, np.int32, 0)),
    ),
    "logit_spread": lambda value: float(_array(value, np.float32, 0)),
    **dict.fromkeys(
        ("tokens", "rows", "greedy"), partial(_array, dtype=np.int32, ndim=1)
    ),
    **dict.fromkeys(("ids", "places"), partial(_array, dtype=np.int32, ndim=2)),
    **dict.fromkeys(
        ("log_sums", "spreads", "gaps"), partial(_array, dtype=np.float32, ndim=1)
    ),
    **dict.fromkeys(("logits", "residual"), partial(_array, dtype=np.float32, ndim=2)),
    "texts": _text_ids,
    "first_ids": lambda ids: None if ids is None else tuple(map(int, ids)),
}


def observe(
    model: ReferenceModel,
    tokens: Int32[np.ndarray, "T"],
    prompt_length: int,
    num_greedy: int,
    **about: Any,
) -> Expected:
    """Runs an implementation over a text, and greedily continues the beginning.

    Args:
      tokens: the text.
      prompt_length: number of tokens to continue.
      num_greedy: number of tokens of the continuation. Each costs a whole pass: a cache
        could have bugs of its own.
      about: other fields of `Expected`: how, versions, and those about texts.

    Raises:
      ValueError: if its numbers are not finite.
    """
    # Greedy tokens first: some rotary embeddings depend on the longest text so far.
    greedy, gaps = [], []
    for _ in range(num_greedy):
        so_far = np.concatenate([tokens[:prompt_length], np.array(greedy, np.int32)])
        logits = model.run(so_far)[0][-1]
        second, first = np.partition(logits, -2)[-2:]
        greedy.append(int(np.argmax(logits)))
        gaps.append(first - second)
    logits, residual = model.run(tokens)
    if not (np.isfinite(logits).all() and np.isfinite(residual).all()):
        raise ValueError(f"{model.name} computes numbers that are not finite")
    return Expected(
        name=model.name,
        made=datetime.date.today().isoformat(),
        model_dim=residual.shape[2],
        vocab_size=logits.shape[1],
        tokens=tokens,
        rows=np.arange(len(tokens), dtype=np.int32),
        ids=None,
        logits=logits.astype(np.float32),
        log_sums=log_sum_exp(logits),
        logit_spread=float(np.float32(logits.std(dtype=np.float64))),
        places=None,
        residual=residual.astype(np.float32),
        spreads=residual.std(axis=(1, 2), dtype=np.float64).astype(np.float32),
        prompt_length=prompt_length,
        greedy=np.array(greedy, np.int32),
        gaps=np.array(gaps, np.float32),
        **about,
    )


def log_sum_exp(logits: Float[np.ndarray, "P V"]) -> Float32[np.ndarray, "P"]:
    """Computes the log-sum-exp of each row in float64."""
    out = np.empty(len(logits), np.float32)
    for i, row in enumerate(logits):  # One row at a time: all may take 1 GB in float64.
        top = row.max().astype(np.float64)
        out[i] = top + np.log(np.exp(row.astype(np.float64) - top).sum())
    return out
