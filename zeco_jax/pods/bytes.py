"""Bytes that the instructions of a compiled program read and write in a device's memory."""

import re

from zeco_jax.pods.hlo import array_bytes
from zeco_jax.pods.program import Instruction, Program

_ARRAY = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
# Memory on the chip itself, as the TPU compiler marks it: S(1) is vector memory; S(5) is the host's.
_SPACE = re.compile(r"\bS\(\d+\)")
_PARAMETER = re.compile(r"\bparameter\((\d+)\)")
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_SAME_PLACE = frozenset({"bitcast", "get-tuple-element", "copy-done"})


def type_bytes(type_: str) -> int:
    """Bytes of an HLO type's arrays that lie in the device's main memory.

    Example:
        >>> from zeco_jax.pods.bytes import type_bytes
        >>> type_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0:T(128)S(1)}, pred[5])")
        29
    """
    return sum(
        array_bytes(dtype, dimensions)
        for dtype, dimensions, layout in _ARRAY.findall(type_)
        if not _SPACE.search(layout)
    )


def memory_bytes(program: Program, instruction: Instruction, computation: str) -> int:
    """What one instruction reads and writes, without the instructions of loops that it calls.

    A fusion that cuts a piece out of an operand reads the piece; one that puts a piece into its result writes the
    piece, because the compiler does it in place.

    Args:
        program: where the instruction stands.
        instruction: any but a loop, a call or a branch.
        computation: the computation that it stands in.
    """
    named = program.named[computation]
    if instruction.opcode == "fusion":
        inside = instruction.called[0]
        read = sum(
            _read(program, parameter, inside, type_bytes(named[name].type))
            for parameter, name in zip(_parameters(program, inside), instruction.operands, strict=False)
            if name in named
        )
        root = program.computations[inside][-1]
        return read + _written(program, root, inside, type_bytes(instruction.type))
    if instruction.opcode in _SLICES:
        return 2 * type_bytes(instruction.type)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * type_bytes(named[instruction.operands[1]].type)
    read = sum(type_bytes(named[name].type) for name in instruction.operands if name in named)
    return read + type_bytes(instruction.type)


def _parameters(program: Program, computation: str) -> list[Instruction]:
    found = [
        (int(number[1]), other)
        for other in program.computations[computation]
        if (number := _PARAMETER.search(other.line))
    ]
    return [other for _, other in sorted(found, key=lambda pair: pair[0])]


def _read(program: Program, value: Instruction, computation: str, size: int) -> int:
    """Of an operand of `size` bytes, those that a fused computation reads."""
    if size == 0:
        return 0
    read = 0
    for user in program.users[computation].get(value.name, ()):
        if user.opcode in _SLICES and user.operands[0] == value.name:
            read += _plain_bytes(user.type)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.opcode in _SAME_PLACE:
            read += _read(program, user, computation, size)
        elif user.opcode == "fusion":
            inside = user.called[0]
            places = [place for place, name in enumerate(user.operands) if name == value.name]
            parameters = _parameters(program, inside)
            read += sum(_read(program, parameters[place], inside, size) for place in places)
        elif user.opcode != "tuple":
            return size
    return min(read, size)


def _written(program: Program, root: Instruction, computation: str, size: int) -> int:
    """Of a result of `size` bytes, those that a fused computation writes."""
    named = program.named[computation]
    if size == 0:
        return 0
    if root.opcode == "dynamic-update-slice":
        return min(size, _plain_bytes(named[root.operands[1]].type))
    if root.opcode == "tuple":
        parts = [named[name] for name in root.operands]
        return sum(_written(program, part, computation, type_bytes(part.type)) for part in parts)
    if root.opcode in _SAME_PLACE and root.operands and root.operands[0] in named:
        return min(size, _written(program, named[root.operands[0]], computation, size))
    if root.opcode == "fusion":
        inside = root.called[0]
        return min(size, _written(program, program.computations[inside][-1], inside, size))
    return size


def _plain_bytes(type_: str) -> int:
    """Wherever they lie: the layouts inside fusions don't say."""
    return sum(array_bytes(dtype, dimensions) for dtype, dimensions, _ in _ARRAY.findall(type_))
