"""Optimized HLO text as instructions: names, shapes, operands, and who calls whom.

Only what `jslora.aot.launches` needs: attributes stay text. One line is one instruction, and a
computation ends at a brace in the first column, as XLA prints scheduled modules.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclass(frozen=True, slots=True)
class Shape:
    """An array's element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = re.match(r"[a-z]+(\d+)", self.dtype)  # of pred and token there are none to read
        return self.size * int(bits[1]) // 8 if bits else self.size * (self.dtype == "pred")

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation; `shapes` are those of its outputs, `text` its attributes."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def calls(self) -> tuple[str, ...]:
        """Names of the computations it calls."""
        lists = ",".join(_BRANCHES.findall(self.text))
        return (*_CALLED.findall(self.text), *re.findall(r"[\w.\-]+", lists))

    def attribute(self, name: str) -> str:
        """A quoted attribute, or nothing."""
        found = re.search(rf'\b{name}="([^"]*)"', self.text)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order they are printed."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each instruction."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


@dataclass(frozen=True)
class Module:
    """Computations by name."""

    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """Read a module as `Compiled.as_text` prints it.

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = Computation(header[2])
            entry = current if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (start := _NAME.match(line)):
            current.instructions[start[2]] = _instruction(start, line[start.end() :])
    if entry is None:
        raise ValueError("the HLO text has no entry computation")
    return Module(computations, entry)


def _instruction(start: re.Match[str], rest: str) -> Instruction:
    """`rest` is shape, opcode, operands in parentheses, attributes."""
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        Shape(dtype, tuple(int(dim) for dim in dims.split(",") if dim))
        for dtype, dims in _SHAPE.findall(rest[:end])
    )
    rest = rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    operands = () if opcode == "constant" else tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return Instruction(start[2], opcode, shapes, operands, rest[end:], bool(start[1]))


def _closing(text: str) -> int:
    """Index behind the parenthesis that closes the one that `text` begins with."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]!r}")
