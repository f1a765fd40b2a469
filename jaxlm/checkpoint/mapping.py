"""Tensors of published files and our parameters: one rule maps both ways.

A published file keeps a tensor for each layer (and often each expert) under a name;
`Params` keeps the layers stacked. A `Rule` names one tensor of the file, the parameters
that lie in it, and how its axes become theirs. Read forwards it loads, read backwards
it exports, so nothing can be mapped in one direction only.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import tree
from jaxlm.checkpoint.tensor_file import (
    BFLOAT16,
    ReadTensor,
    StoredTensor,
    TensorSpecs,
)
from jaxlm.config import ModelConfig, nearest
from jaxlm.model.params import init
from jaxlm.types import Params

# Side of the squares in which a transposed tensor is copied: both stay in the cache.
_TILE = 256
# Values that are checked together: few enough to stay in the cache.
_PIECE = 1 << 18
# What XLA:CPU asks of memory that it takes over without copying it.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Rule:
    """One tensor of a file.

    Patterns are `theirs -> ours`, with the letters of `jaxlm/types.py` for axes, and
    brackets around axes that are one: `(N H) D -> D N H`. More letters: P learned
    positions, h the pairs of a head (H / 2), p the two of a pair. Several parts lie
    one after the other on their first axis; or, where the patterns hold `j`, which has
    no counterpart in ours, part number j is at index j of that axis.
    """

    name: str
    """Name in the file, with {layer} and {expert} for numbers."""
    parts: tuple[tuple[str, str], ...]
    """(path of a parameter, pattern); more than one where tensors are fused."""
    offset: float = 0.0
    """Theirs is ours plus this."""


def rule(name: str, paths: str | Sequence[str], pattern: str, offset=0.0) -> Rule:
    """A rule whose parts all have one pattern."""
    paths = (paths,) if isinstance(paths, str) else paths
    return Rule(name, tuple((path, pattern) for path in paths), offset)


@functools.cache
def parameter_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of each parameter by path."""
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in tree.flatten(shapes).items()}


def select(rules: Sequence[Rule], config: ModelConfig) -> list[Rule]:
    """The rules whose parameters this model has: exactly one for each parameter.

    Raises:
      ValueError: for a parameter that no rule covers.
    """
    shapes = parameter_shapes(config)
    chosen = [r for r in rules if all(path in shapes for path, _ in r.parts)]
    covered = [path for r in chosen for path, _ in r.parts]
    assert len(covered) == len(set(covered)), covered
    if missing := sorted(set(shapes) - set(covered)):
        raise ValueError(f"this format has no tensor for {', '.join(missing)}")
    return chosen


def _split(side: str) -> list[list[str]]:
    """`(N H) D` as [[N, H], [D]]."""
    return [list((a or b).split()) for a, b in re.findall(r"\(([^)]*)\)|(\w)", side)]


def _sizes(config: ModelConfig) -> dict[str, int]:
    c = config
    sizes = {"D": c.model_dim, "N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim}
    sizes |= {"h": c.head_dim // 2, "p": 2, "P": c.context_length}
    return sizes | {"F": c.hidden_dim, "V": c.vocab_size, "E": c.num_experts}


class Translation:
    """The rules of one model, with the sizes of its axes."""

    def __init__(self, config: ModelConfig, rules: Sequence[Rule]):
        """Raises ValueError as `select`."""
        self.config = config
        self.rules = select(rules, config)
        self.shapes = parameter_shapes(config)
        self._axis_sizes = _sizes(config)
        self._rule_of = {
            path: (rule, number)
            for rule in self.rules
            for number, (path, _) in enumerate(rule.parts)
        }

    def names(self, rule: Rule) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor of a rule: its name, and its index on our leading axes."""
        ranges = [range(n) for n in self._leading(rule)]
        for index in itertools.product(*ranges):
            yield self._name(rule, index), index

    def _leading(self, rule: Rule) -> tuple[int, ...]:
        """Sizes of our axes that are numbers in their names."""
        sizes = {"{layer}": self.config.num_layers}
        sizes["{expert}"] = self.config.num_experts
        return tuple(n for word, n in sizes.items() if word in rule.name)

    def _name(self, rule: Rule, index: tuple[int, ...]) -> str:
        layer = index[0] if index else 0
        return rule.name.format(layer=layer, expert=index[-1] if index else 0)

    def _axes(self, rule: Rule, number: int) -> tuple[list[list[str]], list[list[str]]]:
        theirs, ours = rule.parts[number][1].split(" -> ")
        return _split(theirs), _split(ours)

    def _lengths(self, rule: Rule, groups: list[list[str]]) -> list[int]:
        sizes = {**self._axis_sizes, "j": len(rule.parts)}
        return [math.prod(sizes[a] for a in group) for group in groups]

    def _rows(self, rule: Rule) -> list[int]:
        """Where parts that lie one after the other begin, and the end."""
        first = [
            self._lengths(rule, self._axes(rule, i)[0])[0]
            for i in range(len(rule.parts))
        ]
        return [0, *itertools.accumulate(first)]

    def their_shape(self, rule: Rule) -> tuple[int, ...]:
        """Shape of a tensor in the file."""
        theirs, _ = self._axes(rule, 0)
        shape = self._lengths(rule, theirs)
        if not any("j" in group for group in theirs):
            shape[0] = self._rows(rule)[-1]
        return tuple(shape)

    def to_ours(self, path: str, x: np.ndarray) -> np.ndarray:
        """The part of a file's tensor that is a parameter, a view where possible."""
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
        # Exact in f32 from 1 on, and below it to the last of 24 bits.
        return x - x.dtype.type(rule.offset) if rule.offset else x

    def to_theirs(self, rule: Rule, parts: Sequence[np.ndarray]) -> np.ndarray:
        """A tensor of the file from the parameters that lie in it."""
        pieces = []
        for number, x in enumerate(parts):
            theirs, ours = self._axes(rule, number)
            axes = [a for group in ours for a in group]
            wanted = [a for group in theirs for a in group]
            x = x.reshape(self._lengths(rule, [[a] for a in axes]))
            x = x.transpose([axes.index(a) for a in wanted if a != "j"])
            if "j" in wanted:
                x = np.expand_dims(x, wanted.index("j"))
            else:
                x = x.reshape(self._lengths(rule, theirs))
            pieces.append(x)
        if "j" in wanted:
            x = _joined(pieces, wanted.index("j"))
            x = x.reshape(self.their_shape(rule))
        else:
            x = _joined(pieces, 0)
        if rule.offset:
            x = x + x.dtype.type(rule.offset)
        return np.ascontiguousarray(x)

    def check(
        self, tensors: Mapping[str, StoredTensor], ignored: Sequence[str], where: str
    ) -> None:
        """Checks that a file has the tensors of this model and no others.

        Args:
          ignored: regular expressions for names that may be there and are not used.
          where: what is read, for messages.

        Raises:
          ValueError: for missing and unknown tensors, and for wrong shapes; names them.
        """
        shapes = [
            (n, self.their_shape(r)) for r in self.rules for n, _ in self.names(r)
        ]
        expected = dict(shapes)
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
                    f"{tensors[name].where} has shape {list(tensors[name].shape)}, and "
                    f"the config asks for {list(shape)}"
                )
            if tensors[name].dtype not in _EXPONENT:
                raise ValueError(
                    f"{tensors[name].where} is stored as {tensors[name].stored_as}: "
                    "this jaxlm reads weights that are floats, so convert it first"
                )

    def read(
        self,
        tensors: Mapping[str, StoredTensor],
        *,
        dtype: Any = None,
        shardings: Any = None,
        report: Callable[[str], None],
    ) -> Params:
        """Parameters from the tensors of a file that `check` has passed.

        Each device gets only its part. On a CPU the memory that is filled becomes the
        array; elsewhere the host holds one (stacked) parameter at a time.

        Args:
          dtype: of the parameters; None keeps each as it is stored. Layers that are
            stored in several dtypes take the one that holds them all. float64, which
            JAX does not use by default, becomes float32.
          shardings: tree of `jax.sharding.Sharding`s as the parameters; None puts them
            onto the default device.
          report: gets a line for tensors with values that are not finite, and for
            float64.
        """
        where = {} if shardings is None else tree.flatten(shardings)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        params, bad = {}, set()
        with ThreadPoolExecutor() as pool:
            for path, shape in self.shapes.items():
                part = _Part(self, path, tensors, dtype, pool, bad)
                sharding = where.get(path, device)
                params[path] = jax.make_array_from_callback(shape, sharding, part.fill)
        used = [name for rule in self.rules for name, _ in self.names(rule)]
        if dtype is None and any(tensors[n].dtype == np.float64 for n in used):
            report("float64 weights are read as float32")
        if bad:
            report(f"values that are not finite in {_some(sorted(bad))}")
        return tree.nest(params)

    def write(
        self, params: Params, dtype: Any = None
    ) -> tuple[TensorSpecs, ReadTensor]:
        """What a writer of files needs: each tensor's shape and dtype, and its values.

        Args:
          dtype: of the tensors; None keeps those of the parameters.
        """
        flat = tree.flatten(params)
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
            x = self.to_theirs(rule, parts)
            with np.errstate(over="ignore"):
                cast = x.astype(specs[name][1], copy=False)
            if not _is_finite(cast) and _is_finite(x):
                raise ValueError(
                    f"{name} has values that {cast.dtype.name} cannot hold: choose "
                    "bfloat16 or float32"
                )
            return cast

        return specs, read


class _Part:
    """Fills the memory of one parameter, or of a device's part of it."""

    def __init__(self, translation, path, tensors, dtype, pool, bad):
        self._translation, self._path, self._tensors = translation, path, tensors
        self._pool, self._bad = pool, bad
        self._rule, _ = translation._rule_of[path]
        names = [name for name, _ in translation.names(self._rule)]
        stored = _common_dtype([tensors[name].dtype for name in names])
        self._dtype = stored if dtype is None else np.dtype(dtype)

    def fill(self, index: Any) -> np.ndarray:
        """The values at `index` (a slice for each dimension) of the whole parameter."""
        shape = self._translation.shapes[self._path]
        slices = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
        out = _aligned([len(s) for s in slices], self._dtype)
        leading = len(self._translation._leading(self._rule))
        indices = list(itertools.product(*(enumerate(s) for s in slices[:leading])))

        def fill_one(index_pairs: tuple[tuple[int, int], ...]) -> None:
            name = self._translation._name(self._rule, tuple(g for _, g in index_pairs))
            x = self._translation.to_ours(self._path, self._tensors[name].read())
            target = out[tuple(i for i, _ in index_pairs)]
            _copy(target, x[tuple(index[leading:])])
            if not _is_finite(target):
                self._bad.add(name)

        # Lists, so that an error of a thread is raised here.
        list(self._pool.map(fill_one, indices))
        return out


def _joined(pieces: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Arrays one after the other, in a dtype that holds them all."""
    if len(pieces) == 1:
        return pieces[0]
    dtype = _common_dtype([x.dtype for x in pieces])
    return np.concatenate([x.astype(dtype, copy=False) for x in pieces], axis)


def _common_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds all of these, but no wider than float32."""
    common = np.dtype(functools.reduce(jnp.promote_types, dtypes))
    return np.dtype(np.float32) if common == np.float64 else common


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, fast also where source is transposed."""
    if target.dtype == source.dtype and target.dtype == BFLOAT16:
        # NumPy moves integers faster than a dtype that it does not know.
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


# Bits of the exponent: all set means infinite or not a number.
_EXPONENT = {
    np.dtype(np.float64): (np.uint64, 0x7FF0 << 48),
    np.dtype(np.float32): (np.uint32, 0x7F80 << 16),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    BFLOAT16: (np.uint16, 0x7F80),
}


def _is_finite(x: np.ndarray) -> bool:
    """Whether no value of a contiguous float array is infinite or not a number."""
    unsigned, exponent = _EXPONENT[x.dtype]
    bits, mask = x.reshape(-1).view(unsigned), unsigned(exponent)
    for start in range(0, len(bits), _PIECE):
        if (bits[start : start + _PIECE] & mask == mask).any():
            return False
    return True


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialized memory that XLA:CPU can take over."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
