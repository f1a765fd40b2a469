"""Reads from a compiled program what each chip sends to others, by part of a step.

The text is XLA's optimized HLO, `compiled.as_text()`, for CPUs, GPUs or TPUs. Bytes
are counted and not operations: compilers hide gathers in permutes and all-reduces, and
loops hide how often something runs.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from jaxlm.plan.hlo import HloProgram


class Part(StrEnum):
    """What a transfer is for."""

    LAYER_WEIGHTS = "layer weights"
    GRADIENTS = "gradients"
    """Of the layers' weights."""
    HEAD = "head"
    """Weights and gradients of the output head, and what the loss exchanges."""
    EMBEDDING = "embedding"
    TENSOR = "tensor parallelism"
    """Activations of the layers."""
    EXPERT = "expert parallelism"
    """Tokens on their way to experts and back."""
    CONTEXT = "context parallelism"
    """Keys and values, and their gradients."""
    OPTIMIZER = "optimizer"
    REST = "rest"


@dataclass(frozen=True)
class Transfer:
    """One array that a collective operation moves, each time that it runs."""

    part: Part
    kind: str
    """`all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all` or `permute`."""
    dtype: str
    """As HLO names it: `bf16`, `f32`, ..."""
    axes: tuple[str, ...]
    """Mesh axes that it crosses."""
    overlapped: bool
    """Whether the program computes between its start and its end."""
    times: int
    """How often it runs in a step: the trips of the loops around it."""
    bytes: float
    """What a chip sends in a step, all times together: of an operand of S bytes over n
    chips, (n - 1) S for a gather, (n - 1) / n S for a scatter, twice that for an
    all-reduce, S for a permute."""
    name: str
    """Where the operation comes from: its `op_name` in the program's metadata."""


def traffic(text: str, mesh_shape: Mapping[str, int]) -> list[Transfer]:
    """Returns the transfers of the program `text`, largest first.

    Args:
      text: scheduled, optimized HLO. All branches of a conditional count.
      mesh_shape: axis names and sizes of the mesh that the program was made for, as
        `mesh.shape`; partitions are numbered in its order.
    """
    program = HloProgram(text)
    found = []
    # A fusion that starts a transfer, those that compute beside it and the one that
    # ends it all hold the same operation, with one channel.
    fused: dict[str, Transfer] = {}
    for computation, times in program.executions().items():
        for index, instruction in enumerate(program.computations[computation]):
            kind = _KINDS.get(instruction.opcode.removesuffix("-start"))
            if kind is None:
                continue
            overlapped = program.overlapped(computation, index)
            if computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            members, axes = _group(instruction.attributes, mesh_shape)
            if not axes:  # Each device sends to itself.
                continue
            operands = list(program.operand_sizes(computation, instruction))
            if instruction.opcode.startswith("ragged"):
                # Rows of the first go into the second, the longer of which is not full.
                operands = [min(operands[:2], key=lambda operand: operand[1])]
            for dtype, size in operands:
                transfer = Transfer(
                    part=part_of(instruction.op_name, kind, axes),
                    kind=kind,
                    dtype=dtype,
                    axes=axes,
                    overlapped=overlapped,
                    times=times,
                    bytes=times * size * _sent(kind, members),
                    name=instruction.op_name,
                )
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                if computation not in program.fusions or channel is None:
                    found.append(transfer)
                    continue
                seen = fused.get(channel[1], transfer)
                either = seen.overlapped or overlapped
                larger = max(seen, transfer, key=lambda t: t.bytes)
                fused[channel[1]] = replace(larger, overlapped=either)
    found += fused.values()
    return sorted((t for t in found if t.bytes), key=lambda t: -t.bytes)


def part_of(op_name: str, kind: str, axes: tuple[str, ...]) -> Part:
    """Returns the part of a step that an operation of this name belongs to."""
    for scope, part in _SCOPES.items():
        if re.search(rf"\b{scope}\b", op_name):
            return part
    # Compilers for TPUs leave some scatters without a name.
    in_layer = re.search(r"\bBlock\b", op_name)
    if axes == ("tensor",) and (in_layer or not op_name):
        return Part.TENSOR
    if not in_layer:
        return Part.REST
    # The compiler may gather weights by an all-reduce of mostly zeros, too.
    reduces = kind in ("all-reduce", "reduce-scatter")
    weights = re.search(r"->B\w+/dot_general|(convert_element_type|gather)$", op_name)
    if "weight_gradient" in op_name or (reduces and not weights):
        return Part.GRADIENTS
    return Part.LAYER_WEIGHTS


def by_part(transfers: Iterable[Transfer]) -> dict[Part, float]:
    """Returns GiB that a chip sends in a step, for each part."""
    sums = dict.fromkeys(Part, 0.0)
    for transfer in transfers:
        sums[transfer.part] += transfer.bytes / 2**30
    return sums


def rows(transfers: Iterable[Transfer]) -> list[dict]:
    """Returns GiB by part, kind, dtype and overlap: the rows of a table."""
    sums: Counter = Counter()
    for t in transfers:
        sums[t.part, t.kind, t.dtype, t.overlapped] += t.bytes / 2**30
    keys = sorted(sums, key=lambda key: (list(Part).index(key[0]), -sums[key]))
    return [
        {
            "part": str(part),
            "kind": kind,
            "dtype": dtype,
            "overlapped": overlapped,
            "gib": float(f"{sums[part, kind, dtype, overlapped]:.4g}"),
        }
        for part, kind, dtype, overlapped in keys
    ]


_KINDS = {
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
    "collective-broadcast": "permute",
}
_SCOPES = {
    "context_parallel": Part.CONTEXT,
    "expert_parallel": Part.EXPERT,
    "optimizer": Part.OPTIMIZER,
    "head": Part.HEAD,
    r"(Embedder|embed)": Part.EMBEDDING,
}


def _sent(kind: str, members: int) -> float:
    """What a chip sends, for each byte of its operand."""
    return {
        "all-gather": members - 1.0,
        "reduce-scatter": (members - 1) / members,
        "all-to-all": (members - 1) / members,
        "all-reduce": 2 * (members - 1) / members,
        "permute": 1.0 if members > 1 else 0.0,
    }[kind]


def _group(attributes: str, mesh_shape: Mapping[str, int]) -> tuple[int, tuple]:
    """The number of partitions in a group, and the mesh axes that a group crosses."""
    chips = math.prod(mesh_shape.values())
    groups = np.array(list(_groups(attributes, chips)))
    place = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())), -1)
    crosses = (place != place[:, :1]).any((0, 1))
    axes = tuple(a for a, c in zip(mesh_shape, crosses, strict=True) if c)
    return groups.shape[1], axes


def _groups(attributes: str, chips: int) -> Iterable[list[int]]:
    """Reads who exchanges with whom, in each of the forms that XLA writes."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return [
            [int(n) for n in group.split(",")]
            for group in re.findall(r"\{([\d,]+)\}", listed[1])
        ]
    iota = r"(\[[\d,]+\])<=(\[[\d,]+\])(?:T\(([\d,]+)\))?"
    if tiles := re.search("replica_groups=" + iota, attributes):
        return _iota(*tiles.groups())
    if axes := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", attributes):
        sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        return _axis_groups(sizes, axes[2])
    return [list(range(chips))]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(shape: str, sizes: str, permutation: str | None) -> list[list[int]]:
    """`[groups,members]<=[sizes]T(permutation)`."""
    ids = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    if permutation:
        ids = ids.transpose(_numbers(permutation))
    return ids.reshape(_numbers(shape)).tolist()


def _axis_groups(sizes: dict[str, int], crossed: str) -> list[list[int]]:
    """`mesh['a'=4,'b'=2] {'a','b':(1)2}`: axes, or parts of them as (before)size."""
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for axis, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", crossed):
        parts[axis].append((int(before or 1), int(size or sizes[axis])))
    shape, moved = [], []
    for axis, whole in sizes.items():
        done = 1
        for before, size in sorted(parts[axis]):
            if before > done:
                shape.append(before // done)
            moved.append(len(shape))
            shape.append(size)
            done = before * size
        shape.append(whole // done)
    ids = np.moveaxis(ids.reshape(shape), moved, range(-len(moved), 0))
    members = math.prod(ids.shape[-len(moved) :])
    return ids.reshape(-1, members).tolist()
