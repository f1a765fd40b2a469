"""Maps the tensors of published files to our parameters and back.

A published file has one tensor for each layer (and often for each expert); `Params`
stacks the layers. A `Rule` names a tensor of the file, the parameters that it contains
and the order of its axes. The same rule is applied forwards to load and backwards to
export, so no tensor can be mapped in one direction only.
"""

import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import tree
from jaxlm.checkpoint.finite import EXPONENT, is_finite, narrowed
from jaxlm.checkpoint.tensor_file import BFLOAT16, ReadTensor, StoredTensor, TensorSpecs
from jaxlm.config import ModelConfig
from jaxlm.fields import nearest
from jaxlm.model.params import sizes, weights
from jaxlm.types import Params

# Transposed tensors are copied in square tiles of this side, which fit the cache.
_TILE = 256
# In bytes: XLA:CPU takes over memory with this alignment without copying it.
_ALIGNMENT = 64
# More do not read faster, and each holds a tensor.
_MAX_THREADS = 8

# Start and stop of a shard in each dimension.
_Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rule:
    """One tensor of a file.

    Patterns are `theirs -> ours` in the letters of `jaxlm/types.py`, with brackets
    around axes that are merged into one: `(N H) D -> D N H`. C is the length of the
    table of learned positions; h counts the rotary pairs of a head (H / 2), and p the
    two values of a pair. Several parts are concatenated along their first axis; or, if
    the pattern has an axis `j` of the file, part number j is at index j of that axis.
    """

    name: str
    """Name in the file, with {layer} and {expert} for numbers."""
    parts: tuple[tuple[str, str], ...]
    """(path of a parameter, pattern); several if the file fuses parameters."""
    offset: float = 0.0
    """Added to our values in the file."""


def rule(name: str, paths: str | Sequence[str], pattern: str, offset=0.0) -> Rule:
    """Makes a rule whose parts share one pattern."""
    paths = (paths,) if isinstance(paths, str) else paths
    return Rule(name, tuple((path, pattern) for path in paths), offset)


def linear(*layers: tuple[str, str | Sequence[str], str]) -> tuple[Rule, ...]:
    """Makes rules for the weights, and then for the biases, of linear layers.

    Args:
      layers: name in the file without `.weight`, paths and pattern of each weight.
    """
    rules = [rule(f"{name}.weight", paths, pattern) for name, paths, pattern in layers]
    for (name, *_), weight in zip(layers, tuple(rules), strict=True):
        parts = [(f"{path}_bias", _bias_pattern(x)) for path, x in weight.parts]
        rules.append(Rule(f"{name}.bias", tuple(parts)))
    return tuple(rules)


def _bias_pattern(pattern: str) -> str:
    """Drops the input axes; our weights are (in, out)."""
    theirs, ours = pattern.split(" -> ")
    if not ours.startswith("D "):
        return "D -> D"
    return f"{theirs.replace('D', '').strip()} -> {ours.removeprefix('D ')}"


# Queries, keys and values that a file concatenates.
QKV = (
    ("layers/attn/q", "(N H) D -> D N H"),
    ("layers/attn/k", "(K H) D -> D K H"),
    ("layers/attn/v", "(K H) D -> D K H"),
)


def select(rules: Sequence[Rule], config: ModelConfig) -> list[Rule]:
    """Selects the rules for the parameters of this model: exactly one for each.

    Raises:
      ValueError: for a parameter that no rule covers.
    """
    paths = weights(config)
    chosen = [r for r in rules if all(path in paths for path, _ in r.parts)]
    covered = [path for r in chosen for path, _ in r.parts]
    assert len(covered) == len(set(covered)), covered
    if missing := sorted(set(paths) - set(covered)):
        raise ValueError(f"this format has no tensor for {', '.join(missing)}")
    return chosen


def _split(side: str) -> list[list[str]]:
    """Splits `(N H) D` into [[N, H], [D]]."""
    return [list((a or b).split()) for a, b in re.findall(r"\(([^)]*)\)|(\w)", side)]


class TensorMapping:
    """The rules for one model, with the sizes of its axes."""

    def __init__(self, config: ModelConfig, rules: Sequence[Rule]):
        """Selects the rules; raises ValueError as `select`."""
        self.config = config
        self.rules = select(rules, config)
        self.shapes = {path: w.shape(config) for path, w in weights(config).items()}
        self._axis_sizes = {**sizes(config), "h": config.head_dim // 2, "p": 2}
        self._rule_of = {
            path: (rule, number)
            for rule in self.rules
            for number, (path, _) in enumerate(rule.parts)
        }

    def names(self, rule: Rule) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yields the name of each tensor of a rule, and its index in our stacks."""
        ranges = [range(n) for n in self._leading(rule)]
        for index in itertools.product(*ranges):
            yield self._name(rule, index), index

    def _leading(self, rule: Rule) -> tuple[int, ...]:
        """Sizes of our stacked axes, which are numbers in the names of the file."""
        counts = {
            "{layer}": self.config.num_layers,
            "{expert}": self.config.num_experts,
        }
        return tuple(n for word, n in counts.items() if word in rule.name)

    def _name(self, rule: Rule, index: tuple[int, ...]) -> str:
        layer = index[0] if index else 0
        return rule.name.format(layer=layer, expert=index[-1] if index else 0)

    def _axes(self, rule: Rule, number: int) -> tuple[list[list[str]], list[list[str]]]:
        theirs, ours = rule.parts[number][1].split(" -> ")
        return _split(theirs), _split(ours)

    def _lengths(self, rule: Rule, groups: list[list[str]]) -> list[int]:
        axis_sizes = {**self._axis_sizes, "j": len(rule.parts)}
        return [math.prod(axis_sizes[a] for a in group) for group in groups]

    def _rows(self, rule: Rule) -> list[int]:
        """First row of each concatenated part, and the total number of rows."""
        first = [
            self._lengths(rule, self._axes(rule, i)[0])[0]
            for i in range(len(rule.parts))
        ]
        return [0, *itertools.accumulate(first)]

    def their_shape(self, rule: Rule) -> tuple[int, ...]:
        """Returns the shape of a tensor in the file."""
        theirs, _ = self._axes(rule, 0)
        shape = self._lengths(rule, theirs)
        if not any("j" in group for group in theirs):
            shape[0] = self._rows(rule)[-1]
        return tuple(shape)

    def to_ours(self, path: str, x: np.ndarray) -> np.ndarray:
        """Converts a tensor of the file to a parameter; a view where possible."""
        rule, number = self._rule_of[path]
        theirs, ours = self._axes(rule, number)
        axes = [a for group in theirs for a in group]
        if "j" not in axes:
            rows = self._rows(rule)
            x = x[rows[number] : rows[number + 1]]
        x = x.reshape(self._lengths(rule, [[a] for a in axes]))
        if "j" in axes:
            x = x[(slice(None),) * axes.index("j") + (number,)]
            axes.remove("j")
        x = x.transpose([axes.index(a) for group in ours for a in group])
        x = x.reshape(self._lengths(rule, ours))
        # In f32 this is exact from 0.5 on; below, the last of 24 bits is rounded.
        return x - x.dtype.type(rule.offset) if rule.offset else x

    def to_theirs(self, rule: Rule, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Builds a tensor of the file from the parameters that it contains."""
        pieces = []
        for number, x in enumerate(parts):
            theirs, ours = self._axes(rule, number)
            axes = [a for group in ours for a in group]
            target = [a for group in theirs for a in group]
            x = x.reshape(self._lengths(rule, [[a] for a in axes]))
            x = x.transpose([axes.index(a) for a in target if a != "j"])
            if "j" in target:
                x = np.expand_dims(x, target.index("j"))
            else:
                x = x.reshape(self._lengths(rule, theirs))
            pieces.append(x)
        if "j" in target:
            x = _concatenate(pieces, target.index("j"))
            x = x.reshape(self.their_shape(rule))
        else:
            x = _concatenate(pieces, 0)
        if rule.offset:
            x = x + x.dtype.type(rule.offset)
        return np.ascontiguousarray(x)

    def check(
        self, tensors: Mapping[str, StoredTensor], ignored: Sequence[str], where: str
    ) -> None:
        """Checks that a file has the tensors of this model and no others.

        Args:
          ignored: regular expressions for names that may be present but are not used.
          where: the file or folder, for messages.

        Raises:
          ValueError: for missing, unknown and wrongly shaped tensors, with their names.
        """
        expected = {
            name: self.their_shape(rule)
            for rule in self.rules
            for name, _ in self.names(rule)
        }
        missing = [name for name in expected if name not in tensors]
        pattern = re.compile("|".join(ignored) or r"(?!)")
        extra = [n for n in tensors if n not in expected and not pattern.fullmatch(n)]
        if missing:
            hint = nearest(missing[0], extra)
            raise ValueError(f"{where} lacks {_some(missing)}{hint}")
        if extra:
            raise ValueError(
                f"{where} has {_some(extra)}, which a model of its config does not have"
            )
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise ValueError(
                    f"{tensors[name].where} has shape {list(tensors[name].shape)}, but "
                    f"the config requires {list(shape)}"
                )
            if tensors[name].dtype not in EXPONENT:
                raise ValueError(
                    f"{tensors[name].where} is stored as {tensors[name].stored_as}: "
                    "this jaxlm reads floating-point weights only, so convert it first"
                )

    def read(
        self,
        tensors: Mapping[str, StoredTensor],
        *,
        dtype: Any = None,
        shardings: Any = None,
        report: Callable[[str], None],
    ) -> Params:
        """Reads the parameters from the tensors of a file, after `check`.

        Each device gets only its shard. On a CPU the filled memory becomes the array;
        elsewhere the host holds one (stacked) parameter at a time. Beside it there is
        one tensor of the file for each of at most 8 threads.

        Args:
          dtype: as `Checkpoint.params`. With None, if layers are stored in several
            dtypes, the stack takes one that holds them all, and float64, which JAX does
            not use by default, becomes float32.
          shardings: as `Checkpoint.params`.
          report: gets a line for tensors with values that are not finite, and for
            float64.
        """
        by_path = {} if shardings is None else tree.flatten(shardings)
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        params, not_finite = {}, set()
        # Each thread holds a tensor of the file.
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as pool:
            for path, shape in self.shapes.items():
                sharding = by_path.get(path, default)
                indices = sharding.addressable_devices_indices_map(shape).values()
                shards = self._read_shards(
                    path, tensors, dtype, pool, not_finite, indices
                )
                params[path] = jax.make_array_from_callback(
                    shape, sharding, functools.partial(_shard_at, shards, shape)
                )
        used = [name for rule in self.rules for name, _ in self.names(rule)]
        if dtype is None and any(tensors[n].dtype == np.float64 for n in used):
            report("float64 weights are read as float32")
        if not_finite:
            report(f"values that are not finite in {_some(sorted(not_finite))}")
        return tree.nest(params)

    def _read_shards(
        self, path, tensors, dtype, pool, not_finite, indices
    ) -> dict[_Ranges, np.ndarray]:
        """Reads the values at `indices` of a parameter, each tensor of the file once.

        An index is a slice for each dimension.
        """
        rule, _ = self._rule_of[path]
        if dtype is None:
            dtype = _common_dtype([tensors[name].dtype for name, _ in self.names(rule)])
        shape, leading = self.shapes[path], len(self._leading(rule))
        shards = {
            ranges: _aligned([stop - start for start, stop in ranges], np.dtype(dtype))
            for ranges in {_ranges(index, shape) for index in indices}
        }

        def read_one(number: tuple[int, ...]) -> None:
            holding = [r for r in shards if _holds(r, number)]
            if not holding:
                return
            name = self._name(rule, number)
            x = self.to_ours(path, tensors[name].read())
            for ranges in holding:
                at = (i - r[0] for i, r in zip(number, ranges, strict=False))
                target = shards[ranges][tuple(at)]
                _copy(target, x[tuple(slice(*r) for r in ranges[leading:])])
                if not is_finite(target):
                    not_finite.add(name)

        # Consuming the results raises the errors of the threads here.
        list(pool.map(read_one, itertools.product(*map(range, shape[:leading]))))
        return shards

    def write(
        self, params: Params, dtype: Any = None, table_factor: float = 1.0
    ) -> tuple[TensorSpecs, ReadTensor]:
        """Returns what writes a file: shapes and dtypes, and a function for the values.

        Args:
          dtype: dtype of the tensors; None keeps those of the parameters.
          table_factor: the table of embeddings is multiplied by it, in f32, as the
            model does when it computes in f32, so an f32 file has exactly its values.
            Other dtypes round the product; with a power of two nothing is rounded.

        Raises:
          ValueError: for a parameter that the file has no tensor for, such as that of a
            block of one's own: without it, it would be another model.
        """
        flat = tree.flatten(params)
        if unknown := sorted(flat.keys() - self.shapes.keys()):
            raise ValueError(
                f"params have {_some(unknown)}, which the config does not ask for: "
                "only a jaxlm run can hold what a block of one's own adds"
            )
        specs, source = {}, {}
        for rule in self.rules:
            stored = _common_dtype([flat[path].dtype for path, _ in rule.parts])
            stored = stored if dtype is None else np.dtype(dtype)
            for name, index in self.names(rule):
                specs[name] = (self.their_shape(rule), stored)
                source[name] = (rule, index)

        def read(name: str) -> np.ndarray:
            rule, index = source[name]
            parts = [np.asarray(flat[path])[index] for path, _ in rule.parts]
            if table_factor != 1.0 and rule.parts[0][0] == "embed/table":
                parts = [x.astype(np.float32) * np.float32(table_factor) for x in parts]
            x = self.to_theirs(rule, parts)
            return narrowed(x, specs[name][1], name)

        return specs, read


def _ranges(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Ranges:
    bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
    assert all(step == 1 for _, _, step in bounds)
    return tuple((start, stop) for start, stop, _ in bounds)


def _holds(ranges: _Ranges, number: tuple[int, ...]) -> bool:
    """Whether the first dimensions of a shard have the layer (or expert) `number`."""
    pairs = zip(number, ranges, strict=False)
    return all(start <= i < stop for i, (start, stop) in pairs)


def _shard_at(
    shards: Mapping[_Ranges, np.ndarray],
    shape: tuple[int, ...],
    index: tuple[slice, ...] | None,
) -> np.ndarray:
    assert index is not None
    return shards[_ranges(index, shape)]


def _concatenate(pieces: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Concatenates arrays, in a dtype that holds them all."""
    if len(pieces) == 1:
        return pieces[0]
    dtype = _common_dtype([x.dtype for x in pieces])
    return np.concatenate([x.astype(dtype, copy=False) for x in pieces], axis)


def _common_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """Returns the narrowest dtype that holds all of these, at most float32."""
    common = np.dtype(functools.reduce(jnp.promote_types, dtypes))
    return np.dtype(np.float32) if common == np.float64 else common


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Does `target[...] = source`, also fast for a transposed source."""
    if target.dtype == source.dtype and target.dtype == BFLOAT16:
        # NumPy copies integers faster than a dtype that is not its own.
        target, source = target.view(np.uint16), source.view(np.uint16)
    axis = int(np.argmin(source.strides)) if source.ndim > 1 else target.ndim - 1
    if axis == target.ndim - 1 or not source.size:
        _assign(target, source)
        return
    steps = [range(0, target.shape[a], _TILE) for a in (axis, target.ndim - 1)]
    for i, j in itertools.product(*steps):
        at = [slice(None)] * target.ndim
        at[axis], at[-1] = slice(i, i + _TILE), slice(j, j + _TILE)
        _assign(target[tuple(at)], source[tuple(at)])


def _assign(target: np.ndarray, source: np.ndarray) -> None:
    if target.dtype == np.float32 and source.dtype == BFLOAT16:
        # bfloat16 is the upper half of float32.
        bits = target.view(np.uint32)
        bits[...] = source.view(np.uint16)
        bits <<= 16
    else:
        target[...] = source


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Allocates uninitialized memory that XLA:CPU can take over."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _some(names: Sequence[str]) -> str:
    """Joins the first names of a list, with the number of the others."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
