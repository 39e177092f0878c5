"""Cycles of a TPU kernel, read off the schedule that the compiler dumps: no TPU needed."""

import glob
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# What makes libtpu write its schedules to a folder; it reads the variable LIBTPU_INIT_ARGS when it is loaded.
DUMP_ARGUMENTS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?P<label>[A-Z]{2})?\s*:\s*(?P<depth>>*)")
_BRANCH = re.compile(r"sbr\.rel \(")
# Behind the kernel's name stand a number and the names of what is computed with it.
_BUNDLES_FILE = re.compile(r"(?P<call>\d+-(?P<kernel>[^.]+?)(?:\..*)?)-\d+-final_bundles\.txt")
_UTILIZATION_FILE = "{call}-*-final_hlo-static-per-bundle-utilization.txt"
# A branch takes effect this many bundles later.
_DELAY_SLOTS = 4
_MATRIX_UNIT = "MATMUL"
# Up to libtpu 0.0.50.
_FORMER_NAMES = {"MXU": _MATRIX_UNIT}


@dataclass(frozen=True)
class KernelSchedule:
    """One step of a kernel's loop over its grid, as the compiler has scheduled it.

    A core issues one bundle in each cycle, as long as it waits for no copy: what a step takes if its blocks arrive in
    time.

    Attributes:
        cycles: bundles of the step. What only a head's first step does is left out.
        busy: slots in use during the step, summed over its bundles, by unit ("MATMUL", "XLU", "VALU", ...).
        capacity: slots of each unit in one bundle.
    """

    cycles: int
    busy: Mapping[str, int]
    capacity: Mapping[str, int]

    def use(self, unit: str = _MATRIX_UNIT) -> float:
        """The share of a unit's slots that is in use, from 0 to 1.

        Example:
            >>> KernelSchedule(100, {"MATMUL": 240}, {"MATMUL": 4}).use()
            0.6
        """
        return self.busy[unit] / (self.capacity[unit] * self.cycles)


def read_schedule(bundles: str, utilization: str) -> tuple[KernelSchedule, ...]:
    """Reads the two dumps of a kernel with one loop.

    Args:
        bundles: the text of `*-final_bundles.txt`.
        utilization: the text of `*-final_hlo-static-per-bundle-utilization.txt`.

    Returns:
        A schedule for each way that a step can take, in the order of the program: one, or more where the kernel chooses
        at run time between blocks that both use the matrix units.

    Raises:
        ValueError: if they are not dumps of the same kernel, or the kernel has no loop.
    """
    units, capacity, used = _read_utilization(utilization)
    lines = _read_bundles(bundles)
    if len(lines) != len(used):
        raise ValueError(f"bundles and utilization must be of one kernel, got {len(lines)} and {len(used)} bundles")
    always = {place for place, (match, _) in enumerate(lines) if match["depth"]}
    if not always:
        raise ValueError(
            "bundles must be of a kernel with a loop, got none: a grid of one step has no schedule to read"
        )
    matrix_unit = units.index(_MATRIX_UNIT)
    choices = []
    for block in _skippable([line for _, line in lines], [match["label"] == "PF" for match, _ in lines]):
        if any(used[place][matrix_unit] for place in block):
            choices.append(block)
            always -= set(block)
        elif not any("dma" in lines[place][1] for place in block):
            # It neither multiplies nor moves blocks: it sets up a state before the first step.
            always -= set(block)

    def schedule(places: set[int]) -> KernelSchedule:
        busy = {unit: sum(used[place][column] for place in places) for column, unit in enumerate(units)}
        return KernelSchedule(len(places), busy, dict(zip(units, capacity, strict=True)))

    return tuple(schedule(always | set(choice)) for choice in choices) or (schedule(always),)


def read_schedules(folder: Path) -> dict[str, tuple[KernelSchedule, ...]]:
    """The schedules of all kernels with a loop that were dumped to a folder, by the kernel's name.

    Several calls of one kernel are told apart by a number behind its name.
    """
    schedules = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        match = _BUNDLES_FILE.fullmatch(path.name)
        if match is None:
            continue
        (utilization,) = folder.glob(_UTILIZATION_FILE.format(call=glob.escape(match["call"])))
        bundles = path.read_text()
        if not any(bundle["depth"] for bundle, _ in _read_bundles(bundles)):
            continue
        name, count = match["kernel"], 1
        while name in schedules:
            count += 1
            name = f"{match['kernel']} {count}"
        schedules[name] = read_schedule(bundles, utilization.read_text())
    return schedules


def _read_bundles(text: str) -> list[tuple[re.Match[str], str]]:
    """Label and depth of each bundle, and its line."""
    return [(match, line) for line in text.splitlines() if (match := _BUNDLE.match(line))]


def _read_utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Units, slots of each, and slots in use in each bundle."""
    _, names, capacity, _, *rows = (line for line in text.splitlines() if line.strip())
    units = [_FORMER_NAMES.get(name.strip(), name.strip()) for name in names.split(",")]
    return units, [int(n) for n in capacity.split()], [[int(n) for n in row.split()] for row in rows]


def _skippable(lines: list[str], falls_through: list[bool]) -> Iterator[range]:
    """The bundles between a branch and the place it jumps to, where no other branch is among them."""
    waiting: list[int] = []
    for place, line in enumerate(lines):
        if falls_through[place] and waiting:
            begin = waiting.pop()
            if not any(_BRANCH.search(inner) for inner in lines[begin:place]):
                yield range(begin, place)
        if _BRANCH.search(line):
            waiting.append(place + _DELAY_SLOTS + 1)
