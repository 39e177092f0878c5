"""FLA beside us: starts its processes, reads what they measured, and says why there is nothing to read.

FLA's kernels are written in Triton for PyTorch, so that they run in processes of their own, before this one takes
memory of the GPU. Each operation has its own process; one that dies is started again after the case that it died in.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.kernel_cases import Case, Direction

OPERATIONS = {"channel": "chunk_gla", "token": "chunk_simple_gla", "head": "chunk_lightning_attn"}
"""FLA's name for linear attention, by decay; plain linear attention isn't compared."""
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"FLA_CACHE_RESULTS": "0", "FLA_CACHE_MODE": "disabled"}
"""Whatever was tuned for another shape stays out."""


@dataclass
class PeerResult:
    """What is known of FLA's operation on one case.

    Attributes:
        name: of the operation.
        seconds: of a call, one for each round, by direction; from a CUDA graph where that is faster.
        in_graph: directions timed in a CUDA graph.
        extra_bytes: most that a call allocates, by direction.
        check_results: outputs and gradients by name, one set for each check.
        tuning_seconds: until the first call of a direction was done, by direction.
        refused: whether FLA refuses this gradient here, so that it ran with the refusal lifted.
        reason: why something is missing, or "".
    """

    name: str
    seconds: dict[Direction, list[float]] = field(default_factory=dict)
    in_graph: set[Direction] = field(default_factory=set)
    extra_bytes: dict[Direction, int] = field(default_factory=dict)
    check_results: list[Mapping[str, np.ndarray]] = field(default_factory=list)
    tuning_seconds: dict[Direction, float] = field(default_factory=dict)
    refused: bool = False
    reason: str = ""


def missing_packages() -> str:
    """Why FLA cannot be imported here, or ""."""
    missing = [name for name in ("fla", "torch", "triton") if importlib.util.find_spec(name) is None]
    return f"cannot import {', '.join(missing)} (pip install fla-core torch)" if missing else ""


def measure_fla(
    cases: Sequence[Case],
    checks: Mapping[Case, Sequence[Mapping[str, np.ndarray]]],
    directions: Sequence[Direction],
    folder: Path,
    *,
    seconds: float,
    timeout: float,
    announce: Callable[[str], None],
    command: Sequence[str] = (sys.executable, "-m", "experiments.kernel_fla"),
) -> tuple[dict[Case, PeerResult], dict[str, str]]:
    """Measures FLA on every case that it has an operation for.

    Args:
        cases: what to measure.
        checks: float32 inputs for comparisons, with a `cotangent`, by case.
        directions: passes to time.
        folder: for the inputs and results that processes exchange.
        seconds: measuring time for each case and direction; tuning comes on top.
        timeout: seconds after which an operation's processes are ended, and those that compile ahead.
        announce: is told which operation runs, and what its processes said if something is missing.
        command: starts a process.

    Returns:
        A result for each case, and versions of the packages by name.
    """
    by_operation: dict[str, list[Case]] = {}
    for case in cases:
        if case.decay in OPERATIONS:
            by_operation.setdefault(OPERATIONS[case.decay], []).append(case)
    results = {case: PeerResult(OPERATIONS.get(case.decay, "FLA")) for case in cases}
    job: dict[str, Any] = {"directions": list(directions), "seconds": seconds, "cases": {}}
    for operation, its_cases in by_operation.items():
        job["cases"][operation] = [
            {
                "shape": case.shape,
                "decay": case.decay,
                "gate_normalizer": case.gate_normalizer,
                "checks": stored(checks[case], folder / f"{case.decay}-{case.name}"),
            }
            for case in its_cases
        ]
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    versions: dict[str, str] = {}
    announce("FLA: kernels for every pair of widths, compiled beside each other")
    compile_ahead(by_operation, path, timeout, command)
    for operation, its_cases in by_operation.items():
        announce(f"FLA: {operation}, tuned for each shape")
        run_operation(operation, len(its_cases), path, timeout, command)
        read_records(path.with_name(f"{operation}.jsonl"), [results[case] for case in its_cases], versions)
        if any(results[case].reason for case in its_cases):
            announce(
                f"{operation} left gaps; its processes ended with:\n{end_of(path.with_name(f'{operation}.log'), 20)}"
            )
        for case, described in zip(its_cases, job["cases"][operation], strict=True):
            results[case].check_results = loaded(described["checks"])
    for case, result in results.items():
        if case.decay not in OPERATIONS:
            result.reason = f"no operation for decay {case.decay!r} is compared"
    return results, versions


def stored(arrays: Sequence[Mapping[str, np.ndarray]], stem: Path) -> list[tuple[str, str]]:
    """Writes each set of arrays, and names the file that its results go to."""
    names = [(f"{stem}-{i}.npz", f"{stem}-{i}-results.npz") for i in range(len(arrays))]
    for one, (given, _) in zip(arrays, names, strict=True):
        np.savez(given, **one)
    return names


def loaded(names: Sequence[tuple[str, str]]) -> list[Mapping[str, np.ndarray]]:
    """The results of all checks, or nothing if one is missing."""
    if not all(Path(result).exists() for _, result in names):
        return []
    results = []
    for _, path in names:
        with np.load(path) as arrays:
            results.append({name: arrays[name] for name in arrays.files})
    return results


def compile_ahead(
    by_operation: Mapping[str, Sequence[Case]], job: Path, timeout: float, command: Sequence[str]
) -> None:
    """Fills Triton's cache, one process for each operation and pair of widths, since threads alone share one lock.

    A process that fails leaves the compiling, and the report of what is wrong, to the one that measures.
    """
    widths = {
        (name, *case.shape[3:]): index for name, cases in by_operation.items() for index, case in enumerate(cases)
    }
    processes = [
        subprocess.Popen(
            [*command, str(job), name, str(index), "compile"],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for (name, *_), index in widths.items()
    ]
    deadline = time.monotonic() + timeout
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def run_operation(operation: str, count: int, job: Path, timeout: float, command: Sequence[str]) -> None:
    """Runs processes until all cases had their turn or the time is up; how they end is added to the records."""
    records, log = job.with_name(f"{operation}.jsonl"), job.with_name(f"{operation}.log")
    records.touch()
    deadline = time.monotonic() + timeout
    first = 0
    while first < count:
        ending = f"stopped after {timeout:.0f} s"
        left = deadline - time.monotonic()
        if left > 0:
            with log.open("a") as output:
                try:
                    status = subprocess.run(
                        [*command, str(job), operation, str(first)],
                        cwd=ROOT,
                        env=os.environ | ENVIRONMENT,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        timeout=left,
                        check=False,
                    ).returncode
                    ending = f"its process ended with status {status}: {end_of(log)}"
                except subprocess.TimeoutExpired:
                    pass
        reached = [json.loads(line).get("case", -1) for line in records.read_text().splitlines()]
        # A process that reaches no case would reach none the next time either.
        blamed = max(reached, default=-1) if max(reached, default=-1) >= first else count - 1
        with records.open("a") as output:
            for case in range(first, blamed + 1):
                # Counts only where the case didn't get to its end.
                print(json.dumps({"case": case, "ending": ending}), file=output)
        first = blamed + 1


def end_of(log: Path, lines: int = 1) -> str:
    """What a process said last."""
    said = log.read_text(errors="replace").strip().splitlines()[-lines:]
    return "\n".join(line[:300] for line in said) or "it said nothing"


def read_records(path: Path, results: Sequence[PeerResult], versions: dict[str, str]) -> None:
    """Fills in the results of one operation's cases, in the job's order, and the versions of the packages."""
    done = set()
    for line in path.read_text().splitlines():
        record = json.loads(line)
        versions.update(record.get("versions", {}))
        if "case" not in record:
            continue
        result, direction = results[record["case"]], record.get("direction")
        if "done" in record:
            done.add(record["case"])
        if "tuning" in record:
            result.tuning_seconds[direction] = record["tuning"]
            result.refused |= record["refused"]
        if "seconds" in record:
            result.seconds[direction] = record["seconds"]
            result.extra_bytes[direction] = record["extra_bytes"]
        if "graph_seconds" in record and np.median(record["graph_seconds"]) < np.median(result.seconds[direction]):
            result.seconds[direction] = record["graph_seconds"]
            result.in_graph.add(direction)
        if "error" in record:
            result.reason = record["error"]
        elif "ending" in record and record["case"] not in done and not result.reason:
            result.reason = record["ending"]
    for index, result in enumerate(results):
        if index not in done and not result.reason:
            result.reason = "had no turn"
