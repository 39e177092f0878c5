"""The text of an HLO module as computations and instructions."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{\s*$")
_DEFINITION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = ")
_OPCODE = re.compile(r" ?(?P<opcode>[\w-]+)\(")
_ARRAY = re.compile(r"[a-z]+\d*\w*\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_CALLS = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_CALL_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_INTEGER = re.compile(r"constant\((-?\d+)\)")

CONTROL = frozenset({"while", "call", "conditional"})


class Instruction(NamedTuple):
    """One line of HLO.

    Attributes:
        name: without the percent sign.
        opcode: "fusion", "dot", "collective-permute-start", ...
        type: of the result, as text.
        operands: names of the operands.
        line: all of it.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    line: str

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the result; one for each array of a tuple."""
        return [tuple(int(d) for d in dimensions.split(",") if d) for dimensions in _ARRAY.findall(self.type)]

    @property
    def called(self) -> list[str]:
        """Computations that run when this instruction does; not the condition of a loop."""
        lists = [_NAME.findall(names) for names in _CALL_LISTS.findall(self.line)]
        return _CALLS.findall(self.line) + [name for names in lists for name in names]


@dataclass(frozen=True)
class Program:
    """The computations of an HLO module, each with its instructions in the order of the text.

    Attributes:
        computations: by name.
        entry: name of the one that the program begins with.
        trips: how often each loop runs its body, by the name of its `while`; loops of which that isn't known are left
            out.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    trips: dict[str, int]

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions of the computations that this one calls, one level down."""
        for name in instruction.called:
            yield from self.computations.get(name, ())

    @cached_property
    def named(self) -> dict[str, dict[str, Instruction]]:
        """The instructions of each computation by name."""
        return {
            computation: {other.name: other for other in instructions}
            for computation, instructions in self.computations.items()
        }

    @cached_property
    def users(self) -> dict[str, dict[str, list[Instruction]]]:
        """Who uses each result, by computation and name."""
        found: dict[str, dict[str, list[Instruction]]] = {}
        for computation, instructions in self.computations.items():
            here = found.setdefault(computation, {})
            for other in instructions:
                for name in dict.fromkeys(other.operands):
                    here.setdefault(name, []).append(other)
        return found

    def runs(self, instruction: Instruction) -> int:
        """How often a loop runs its body, as far as that is known; 1 for everything else."""
        return self.trips.get(instruction.name, 1)

    def scheduled(self) -> dict[str, int]:
        """How often each computation runs whose instructions run one by one; those of fusions are not among them."""
        runs: dict[str, int] = {}
        waiting = [(self.entry, 1)]
        for name, times in waiting:
            runs[name] = runs.get(name, 0) + times
            for instruction in self.computations[name]:
                if instruction.opcode in CONTROL:
                    waiting += [(called, times * self.runs(instruction)) for called in instruction.called]
        return runs


def parse_program(compiled_text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
        ValueError: text that isn't that of a scheduled HLO module.
    """
    if not re.search(r"^HloModule .*\bis_scheduled=true", compiled_text, re.MULTILINE):
        raise ValueError("compiled_text must be that of a compiled program, with is_scheduled=true in its first line")
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in compiled_text.splitlines():
        if header := COMPUTATION.match(line):
            current = computations.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        elif instruction := _parse(line):
            current.append(instruction)
    loops = [
        (loop, instructions)
        for instructions in computations.values()
        for loop in instructions
        if loop.opcode == "while"
    ]
    trips = {loop.name: _trips(loop, instructions, computations) for loop, instructions in loops}
    return Program(
        computations={name: tuple(instructions) for name, instructions in computations.items()},
        entry=entry,
        trips={name: count for name, count in trips.items() if count is not None},
    )


def _trips(loop: Instruction, around: list[Instruction], computations: dict[str, list[Instruction]]) -> int | None:
    """As the compiler notes it, or counted for a loop `for i in range(first, last)`; None for any other."""
    if noted := _TRIPS.search(loop.line):
        return int(noted[1])
    condition, body = (computations.get(pattern.search(loop.line)[1], []) for pattern in (_CONDITION, _BODY))
    if not condition or not body or condition[-1].opcode != "compare" or "direction=LT" not in condition[-1].line:
        return None
    inside = {other.name: other for other in condition}
    counter, last = (inside.get(name) for name in condition[-1].operands)
    index = _INDEX.search(counter.line) if counter else None
    if index is None:
        return None
    first = _element(around, loop.operands[0], int(index[1]))
    step = _element(body, body[-1].name, int(index[1]))
    steps = {other.name: other for other in body}
    increments = [_integer(steps.get(name)) for name in step.operands] if step and step.opcode == "add" else []
    if _integer(first) is None or _integer(last) is None or 1 not in increments:
        return None
    return max(_integer(last) - _integer(first), 0)


def _element(instructions: list[Instruction], name: str, index: int) -> Instruction | None:
    """What a tuple holds at `index`, behind copies."""
    inside = {other.name: other for other in instructions}
    tuple_ = inside.get(name)
    if tuple_ is None or tuple_.opcode != "tuple" or index >= len(tuple_.operands):
        return None
    element = inside.get(tuple_.operands[index])
    while element is not None and element.opcode == "copy":
        element = inside.get(element.operands[0])
    return element


def _integer(instruction: Instruction | None) -> int | None:
    value = _INTEGER.search(instruction.line) if instruction else None
    return int(value[1]) if value else None


def _parse(line: str) -> Instruction | None:
    definition = _DEFINITION.match(line)
    if definition is None:
        return None
    rest = line[definition.end() :]
    # A type is one word, or a tuple of types in parentheses.
    length = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, length)
    if opcode is None:
        return None
    operands = rest[opcode.end() : _closing(rest, opcode.end() - 1)]
    return Instruction(definition["name"], opcode["opcode"], rest[:length], tuple(_NAME.findall(operands)), line)


def _closing(text: str, opening: int) -> int:
    """The place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text)
