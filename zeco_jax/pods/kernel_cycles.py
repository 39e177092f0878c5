"""Cycles of a TPU kernel, read off the schedule that the compiler dumps: no TPU needed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# What makes libtpu write its schedules to a folder; it reads the variable LIBTPU_INIT_ARGS when it is loaded.
DUMP_ARGUMENTS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?P<label>[A-Z]{2})?\s*:\s*(?P<depth>>*)")
_BRANCH = re.compile(r"sbr\.rel \(")
_BUNDLES_FILE = re.compile(r"(?P<start>\d+)-(?P<kernel>.+?)(?:\.\d+)?-\d+-final_bundles\.txt")
_UTILIZATION_FILE = "{start}-{kernel}*-final_hlo-static-per-bundle-utilization.txt"
# A branch takes effect this many bundles later.
_DELAY_SLOTS = 4
_MATRIX_UNIT = "MATMUL"


@dataclass(frozen=True)
class KernelSchedule:
    """The loop of a kernel over its grid, as the compiler has scheduled it.

    A core issues one bundle in each cycle, as long as it waits for no copy: what a step takes if its blocks arrive in
    time.

    Attributes:
        cycles: bundles of one step. What only a head's first step does is left out.
        busy: slots in use during a step, summed over its bundles, by unit ("MATMUL", "XLU", "VALU", ...).
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


def read_schedule(bundles: str, utilization: str) -> KernelSchedule:
    """Reads the two dumps of a kernel with one loop.

    Args:
        bundles: the text of `*-final_bundles.txt`.
        utilization: the text of `*-final_hlo-static-per-bundle-utilization.txt`.

    Raises:
        ValueError: if they are not dumps of the same kernel, or the kernel has no loop.
    """
    units, capacity, used = _read_utilization(utilization)
    lines = [(match, line) for line in bundles.splitlines() if (match := _BUNDLE.match(line))]
    if len(lines) != len(used):
        raise ValueError(f"bundles and utilization must be of one kernel, got {len(lines)} and {len(used)} bundles")
    in_loop = [bool(match["depth"]) for match, _ in lines]
    if not any(in_loop):
        raise ValueError("bundles must be of a kernel with a loop, got none: a grid of one step has no schedule to read")
    first_step_only = _first_step_only([line for _, line in lines], [match["label"] == "PF" for match, _ in lines], used)
    step = [row for row, looped, skipped in zip(used, in_loop, first_step_only, strict=True) if looped and not skipped]
    busy = {unit: sum(row[column] for row in step) for column, unit in enumerate(units)}
    return KernelSchedule(len(step), busy, dict(zip(units, capacity, strict=True)))


def read_schedules(folder: Path) -> dict[str, KernelSchedule]:
    """The schedules of all kernels with a loop that were dumped to a folder, by the kernel's name.

    Several calls of one kernel are told apart by a number behind its name.
    """
    schedules = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        match = _BUNDLES_FILE.fullmatch(path.name)
        if match is None:
            continue
        (utilization,) = folder.glob(_UTILIZATION_FILE.format(**match.groupdict()))
        try:
            schedule = read_schedule(path.read_text(), utilization.read_text())
        except ValueError:
            continue
        name, count = match["kernel"], 1
        while name in schedules:
            count += 1
            name = f"{match['kernel']} {count}"
        schedules[name] = schedule
    return schedules


def _read_utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """Units, slots of each, and slots in use in each bundle."""
    _, names, capacity, _, *rows = (line for line in text.splitlines() if line.strip())
    units = [name.strip() for name in names.split(",")]
    return units, [int(n) for n in capacity.split()], [[int(n) for n in row.split()] for row in rows]


def _first_step_only(lines: list[str], falls_through: list[bool], used: list[list[int]]) -> list[bool]:
    """Marks the bundles between a branch and its target that neither multiply nor move blocks: they set states up."""
    marked = [False] * len(lines)
    for place, line in enumerate(lines):
        if not _BRANCH.search(line):
            continue
        begin = place + _DELAY_SLOTS + 1
        end = next((i for i in range(begin, len(lines)) if falls_through[i]), begin)
        body = range(begin, end)
        if not any("dma" in lines[i] or used[i][0] or _BRANCH.search(lines[i]) for i in body):
            for i in body:
                marked[i] = True
    return marked
