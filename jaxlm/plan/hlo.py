"""Reads the text of a compiled program: scheduled, optimized HLO."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_BITS = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COMPUTING = {"fusion", "dot", "convolution", "custom-call", "while", "call"}
_CALLS = re.compile(
    r"(?:calls|body|to_apply|(?:branch|called)_computations|(?:true|false)_computation)"
    r"=\{?(%[\w.\-~]+(?:, ?%[\w.\-~]+)*)"
)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def index(self) -> int:
        """Which element of a tuple it takes."""
        found = re.search(r"index=(\d+)", self.attributes)
        assert found is not None, self
        return int(found[1])

    @property
    def value(self) -> int | None:
        """Of an integer constant."""
        number = self.opcode == "constant" and self.operands
        return int(self.operands[0]) if number else None


class HloProgram:
    """The computations of an HLO text, and which of them call which."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        instructions: list[Instruction] = []
        for line in text.splitlines():
            if line.startswith(" "):
                instructions += _instruction(line)
            elif header := re.match(r"(ENTRY )?%?([\w.\-~]+) .*\{$", line):
                self.computations[header[2]] = instructions = []
                if header[1]:
                    self.entry = header[2]
        self._named = {
            computation: {i.name: i for i in instructions}
            for computation, instructions in self.computations.items()
        }
        self.fusions = {
            called
            for instructions in self.computations.values()
            for instruction in instructions
            if instruction.opcode == "fusion"
            for called in _called(instruction)
        }
        # Computations that run between an async-start and an async-done.
        self._asynchronous: set[str] = set()

    def executions(self) -> Counter[str]:
        """How often each computation runs in one run of the program."""
        times: Counter[str] = Counter()

        def run(computation: str, count: int) -> None:
            times[computation] += count
            for index, instruction in enumerate(self.computations[computation]):
                trips = 1
                if instruction.opcode == "while":
                    trips = self._trips(computation, instruction)
                starts = instruction.opcode == "async-start"
                if starts and self._computes_before_the_end(computation, index):
                    self._asynchronous.update(_called(instruction))
                for called in _called(instruction):
                    run(called, count * trips)

        run(self.entry, 1)
        return times

    def overlapped(self, computation: str, index: int) -> bool:
        """Whether something is computed while a collective operation runs."""
        if "async_collective_fusion" in computation:
            return True
        if computation in self._asynchronous:
            return True
        started = self.computations[computation][index].opcode.endswith("-start")
        return started and self._computes_before_the_end(computation, index)

    def operand_sizes(
        self, computation: str, instruction: Instruction
    ) -> Iterator[tuple[str, int]]:
        """The dtype and the bytes of each array that an instruction takes."""
        for operand in instruction.operands:
            yield from _arrays(self._named[computation][operand].shape)

    def _computes_before_the_end(self, computation: str, index: int) -> bool:
        instructions = self.computations[computation]
        start = instructions[index].name
        for instruction in instructions[index + 1 :]:
            if start in instruction.operands and instruction.opcode.endswith("-done"):
                return False
            if instruction.opcode in _COMPUTING:
                return True
        return False

    def _trips(self, computation: str, loop: Instruction) -> int:
        """How often a loop runs, whose counter is compared with a constant."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        called = dict(re.findall(r"(condition|body)=%?([\w.\-~]+)", loop.attributes))
        condition, body = called["condition"], called["body"]
        compare = self._root(condition)
        if compare.opcode == "fusion":
            # What is compared is an argument, or a constant in there.
            return max(self._constants(condition), default=1)
        counter, limit = (self._find(condition, name) for name in compare.operands)
        if counter.opcode == "constant":
            counter, limit = limit, counter
        index = counter.index
        start = self._find(computation, loop.operands[0])
        start = self._find(computation, start.operands[index])
        advance = self._find(body, self._root(body).operands[index])
        steps = [self._find(body, name).value for name in advance.operands]
        step = next((s for s in steps if s is not None), 1)
        return math.ceil(((limit.value or 1) - (start.value or 0)) / step)

    def _root(self, computation: str) -> Instruction:
        return self.computations[computation][-1]

    def _find(self, computation: str, name: str) -> Instruction:
        """The instruction `name`, or what it copies."""
        found = self._named[computation][name]
        while found.opcode in ("copy", "bitcast", "convert"):
            found = self._named[computation][found.operands[0]]
        return found

    def _constants(self, computation: str) -> Iterator[int]:
        for instruction in self.computations[computation]:
            if instruction.value is not None:
                yield instruction.value
            for called in _called(instruction):
                yield from self._constants(called)


def _instruction(line: str) -> Iterator[Instruction]:
    """Yields the instruction of a line, if it has one."""
    # The first word before a parenthesis, after the shape: shapes have ":T(8,128)".
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-~]+) = (.*?) ([a-z][a-z0-9\-]*)\(", line)
    if found is None:
        return
    depth, end = 1, found.end()
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    inside = line[found.end() : end - 1]
    operands = re.findall(r"%([\w.\-~]+)", inside) or re.findall(r"^\d+$", inside)
    yield Instruction(
        found[1], found[2], found[3], tuple(operands), attributes=line[end:]
    )


def _called(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction runs, but for conditions."""
    found = _CALLS.findall(instruction.attributes)
    return [name for names in found for name in re.findall(r"%([\w.\-~]+)", names)]


def _arrays(shape: str) -> Iterator[tuple[str, int]]:
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _BITS.match(dtype)
        each = int(bits[1]) / 8 if bits else 1
        yield dtype, math.ceil(each * math.prod(int(n) for n in sizes.split(",") if n))
