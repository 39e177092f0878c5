"""What a compiled program takes of a device's memory, and which arrays take it."""

import bisect
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax

from zeco_jax.pods.hlo import source_of

_ALLOCATION = re.compile(r"^allocation \d+: size (?P<size>\d+)(?:, color (?P<color>\d+))?.*\bpreallocated-temp")
_VALUE = re.compile(
    r"^ value: <\d+ (?P<name>\S+?)(?P<index>\{[\d,]*\})?(?: \(phi\))? @\d+> "
    r"\(size=(?P<size>\d+),offset=(?P<offset>\d+)\): (?P<type>.*)$"
)
_RANGE = re.compile(r"^    (?P<name>.*)\{(?P<index>[\d,]*)\}:(?P<start>\d+)-(?P<end>\d+)$")
_LAYOUT = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one device's memory.

    Attributes:
        arguments: what is handed in.
        outputs: what is handed out.
        aliased: of the outputs, what takes the place of donated arguments.
        temporaries: set aside while the program runs.
        code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class Buffer(NamedTuple):
    """Arrays of one kind among the temporaries that are alive when most of them are.

    Attributes:
        type: such as "bf16[24,1,32768,2048]".
        count: how many.
        bytes: of all of them together.
        source: the operation that the first of them comes from.
    """

    type: str
    count: int
    bytes: int
    source: str


class CompiledStep(NamedTuple):
    """A program as the compiler left it.

    Attributes:
        text: its HLO, in the order in which it runs.
        memory: what it takes.
        buffers: the temporaries that are alive when most of them are, largest first.
    """

    text: str
    memory: MemoryUse
    buffers: tuple[Buffer, ...]


class _Value(NamedTuple):
    name: str
    type: str
    offset: int
    size: int
    start: int
    end: int


def compile_step(lowered: jax.stages.Lowered, options: Mapping[str, object] | None = None) -> CompiledStep:
    """Compiles a program and reads from the compiler's reports where its memory goes.

    Args:
        lowered: `jax.jit(f).lower(...)`, for devices that are here or elsewhere.
        options: of the compiler.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from zeco_jax.pods import compile_step
        >>> step = compile_step(jax.jit(lambda x: jnp.sin(x @ x) @ x).lower(jnp.ones((64, 64))))
        >>> step.memory.arguments, step.memory.outputs, step.buffers[0].type
        (16384, 16384, 'f32[64,64]')
    """
    with tempfile.TemporaryDirectory() as directory:
        compiled = lowered.compile({**(options or {}), "xla_dump_to": directory})
        text = compiled.as_text()
        reports = [_report(Path(directory), suffix) for suffix in ("buffer-assignment", "live-range")]
    return CompiledStep(text, memory_use(compiled), peak_buffers(*reports, text))


def memory_use(compiled: jax.stages.Compiled) -> MemoryUse:
    """What a compiled program takes of each device's memory."""
    stats = compiled.memory_analysis()
    return MemoryUse(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def peak_buffers(assignment: str, live_ranges: str, text: str = "") -> tuple[Buffer, ...]:
    """The temporaries that are alive when most of them are, largest first.

    Args:
        assignment: the compiler's report on where values lie.
        live_ranges: its report on how long they live.
        text: the compiled program, which knows where values come from.
    """
    values = _temporaries(assignment, live_ranges)
    if not values:
        return ()
    alive = _alive_at_peak(values)
    sources = {
        match[1]: source
        for line in text.splitlines()
        if (match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)) and (source := source_of(line))
    }
    groups: dict[str, list[_Value]] = {}
    for value in alive:
        groups.setdefault(value.type, []).append(value)
    buffers = [
        Buffer(
            type_,
            len(group),
            sum(value.size for value in group),
            next((sources[value.name] for value in group if value.name in sources), ""),
        )
        for type_, group in groups.items()
    ]
    return tuple(sorted(buffers, key=lambda buffer: -buffer.bytes))


def _temporaries(assignment: str, live_ranges: str) -> list[_Value]:
    """The values in the largest block of temporaries."""
    ranges = {
        (match["name"], match["index"]): (int(match["start"]), int(match["end"]))
        for line in live_ranges.splitlines()
        if (match := _RANGE.match(line))
    }
    blocks: dict[int, list[_Value]] = {}
    size = -1
    for line in assignment.splitlines():
        if line.startswith("allocation"):
            block = _ALLOCATION.match(line)
            # Colours other than the default are memories on the chip.
            size = int(block["size"]) if block and not block["color"] else -1
            continue
        match = _VALUE.match(line) if size >= 0 else None
        if match is None:
            continue
        lifetime = ranges.get((match["name"], (match["index"] or "{}")[1:-1]))
        if lifetime is not None:
            value = _Value(
                match["name"], _LAYOUT.sub("", match["type"]), int(match["offset"]), int(match["size"]), *lifetime
            )
            blocks.setdefault(size, []).append(value)
    return blocks[max(blocks)] if blocks else []


def _alive_at_peak(values: list[_Value]) -> list[_Value]:
    """The values that are there when most of the block is taken; of those that share a place, the largest."""
    large_first = sorted(values, key=lambda value: (-value.size, value.start))
    at_starts = (
        _without_sharers(value for value in large_first if value.start <= time <= value.end)
        for time in {value.start for value in values}
    )
    return max(at_starts, key=lambda alive: sum(value.size for value in alive))


def _without_sharers(values: Iterable[_Value]) -> list[_Value]:
    """Values, given largest first, whose places don't touch: one that uses another's place is the same in new form."""
    starts: list[int] = []
    taken: list[_Value] = []
    for value in values:
        index = bisect.bisect(starts, value.offset)
        before = index > 0 and taken[index - 1].offset + taken[index - 1].size > value.offset
        after = index < len(taken) and taken[index].offset < value.offset + value.size
        if not before and not after:
            starts.insert(index, value.offset)
            taken.insert(index, value)
    return taken


def _report(directory: Path, name: str) -> str:
    """The compiler's last report of that name; empty if it wrote none."""
    paths = sorted(directory.glob(f"*after_optimizations-{name}.txt"))
    return paths[-1].read_text() if paths else ""
