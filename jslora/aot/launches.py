"""What a compiled module does on a device: the launches of its schedule, in order.

A launch is an instruction that makes the device do something: a fusion, a product, a kernel of
ours, a copy, a collective. What only names memory (bitcast, tuple, parameter, constant) is none.
The count is structural: a product may turn out to be two kernels, and what autotuning would choose
on a real device is not known here.

Bytes are what shapes tell: a gather or slice reads what it yields, an update in place writes the
update, everything else its whole operands and outputs. What kernels of ours read from the pool
depends on the batch and counts as nothing.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from jslora.aot.hlo import Computation, Instruction, Module, Shape

_SILENT = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
    "add-dependency", "partition-id", "replica-id", "domain",
}  # fmt: skip
_COLLECTIVES = {
    "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute",
    "collective-broadcast", "ragged-all-to-all", "send", "recv",
}  # fmt: skip
_LOOPS = {"while", "conditional"}
_OURS = ("__gpu$xla.gpu.triton", "triton_kernel_call")
_IN_PLACE = {"scatter": 2, "dynamic-update-slice": 1}
"""Opcodes that update their first operand, and which operand holds the update."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: what kind, a label that is the same in every layer, and the bytes it moves."""

    kind: str
    label: str
    instruction: Instruction
    bytes: int
    rewrites: bool
    """Whether what it puts out is new memory, and not an operand updated in place."""


def find(module: Module, pool: int) -> list[Launch]:
    """The launches of a module, loops as one and then what is in them.

    Args:
        pool: number of elements of the pool.
    """
    return [
        _launch(module, computation, instruction, pool)
        for computation, instruction in _scheduled(module, module.entry)
    ]


def _scheduled(
    module: Module, computation: Computation
) -> Iterator[tuple[Computation, Instruction]]:
    """Instructions that launch something, in called computations too."""
    for instruction in computation:
        opcode = instruction.opcode
        if opcode in _SILENT or opcode.endswith("-done"):
            continue
        if opcode not in ("call", "async-start"):
            yield computation, instruction
        if opcode in ("call", "async-start", *_LOOPS):
            for name in instruction.calls:
                yield from _scheduled(module, module.computations[name])


def _launch(
    module: Module, computation: Computation, instruction: Instruction, pool: int
) -> Launch:
    opcode = instruction.opcode.removesuffix("-start")
    body = module.computations[instruction.calls[0]] if opcode == "fusion" else None
    inner = next((i for i in body or () if i.opcode == "custom-call"), None)
    what = inner or instruction  # a custom call and the slices it reads may be one fusion
    kind = _kind(what.opcode.removesuffix("-start"), what, body)
    operands = [computation.instructions[name] for name in instruction.operands]
    if body is not None and inner is None:
        moved, rewrites = _fusion_bytes(body)
    else:
        arrays = [shape for operand in operands for shape in operand.shapes]
        ours = kind == "kernel"
        moved = sum(s.bytes for s in arrays if not (ours and s.size == pool)) + instruction.bytes
        aliased = "output_to_operand_aliasing=" in what.text
        rewrites = not aliased and opcode not in _IN_PLACE and kind != "loop"
    return Launch(kind, _label(opcode, kind, what), instruction, moved, rewrites)


def _kind(opcode: str, instruction: Instruction, body: Computation | None) -> str:
    if opcode in _LOOPS:
        return "loop"
    if opcode in _COLLECTIVES:
        return "collective"
    if opcode == "copy":
        return "copy"
    if opcode == "custom-call":
        target = instruction.attribute("custom_call_target")
        if target.startswith("__cublas"):
            return "product"
        return "kernel" if target.startswith(_OURS) else "other"
    if opcode == "dot" or any(i.opcode == "dot" for i in body or ()):
        return "product"
    return "fusion" if opcode == "fusion" else "other"


def _label(opcode: str, kind: str, instruction: Instruction) -> str:
    """A name without the number that sets it apart from its like."""
    if kind == "kernel":
        return kernel_name(instruction)
    if instruction.opcode == "custom-call":
        return instruction.attribute("custom_call_target")
    return opcode if kind in ("collective", "loop") else _unnumbered(instruction.name)


def kernel_name(instruction: Instruction) -> str:
    """The name of a Pallas kernel, or that of a Triton one, which is in its packed PTX."""
    if found := re.search(r'\bname = "([^"]+)"', instruction.text):
        return found[1]
    if found := re.search(r'opaque = "((?:[^"\\]|\\.)*)"', instruction.text):
        packed = re.sub(
            rb"\\([0-9A-F]{2}|.)",
            lambda m: bytes.fromhex(m[1].decode()) if len(m[1]) == 2 else m[1],
            found[1].encode("latin-1"),
        )
        if entry := re.search(rb"\.entry (\w+)\(", zlib.decompress(packed)):
            return entry[1].decode()
    return _unnumbered(instruction.name)


def _unnumbered(name: str) -> str:
    return re.sub(r"(?:\.remat|[.\d])+$", "", name)


def _fusion_bytes(body: Computation) -> tuple[int, bool]:
    """Bytes read and written, and whether any output is new memory."""
    moved = 0
    for instruction in body:
        if instruction.opcode == "parameter":
            moved += _bytes_read(body, instruction)
    rewrites = False
    for output in _outputs(body, body.root):
        if output.opcode in _IN_PLACE and _given(body, output.operands[0]):
            moved += body.instructions[output.operands[_IN_PLACE[output.opcode]]].bytes
        else:
            moved, rewrites = moved + output.bytes, True
    return moved, rewrites


def _outputs(body: Computation, root: Instruction) -> Iterator[Instruction]:
    """What a fusion yields, behind tuples and bitcasts."""
    if root.opcode in ("tuple", "bitcast"):
        for name in root.operands:
            yield from _outputs(body, body.instructions[name])
    else:
        yield root


def _given(body: Computation, name: str) -> bool:
    """Whether a value is a parameter of the fusion, and not made in it."""
    value = body.instructions[name]
    if value.opcode == "bitcast":
        return _given(body, value.operands[0])
    return value.opcode == "parameter"


def _bytes_read(body: Computation, value: Instruction) -> int:
    """Bytes of a fusion's parameter that it reads, at most all of them."""
    read = 0
    for user in body.users[value.name]:
        first = user.operands[0] == value.name
        if user.opcode == "bitcast":
            read += _bytes_read(body, user)
        elif first and user.opcode in ("gather", "slice", "dynamic-slice"):
            read += user.bytes
        elif not (first and user.opcode in _IN_PLACE):
            read += value.bytes
    return min(read, value.bytes)


def put_out(launch: Launch) -> int:
    """Bytes of a launch's results; one that only starts may name its operands before them."""
    made = launch.instruction
    named = made.opcode.endswith("-start") and len(made.shapes) > len(made.operands)
    return sum(shape.bytes for shape in made.shapes[len(made.operands) * named :])


def arrays(launches: list[Launch]) -> Iterator[tuple[Launch, Shape]]:
    """Every array that a launch leaves in new memory."""
    for launch in launches:
        if launch.rewrites:
            for shape in launch.instruction.shapes:
                yield launch, shape
