"""How long devices wait for an exchange, read from a profile: time in its kernels that no other kernel covers."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.profiler import ProfileData

_EXCHANGE = ("nccl", "memcpyp2p")
_DEVICE, _KERNELS = "/device:GPU", "Stream"

Interval = tuple[float, float]


class Exposure(NamedTuple):
    """Seconds per run.

    A device that is ahead of the others waits for them in its kernels of the exchange, whatever that costs itself: what
    all devices have in common is the exchange's own.

    Attributes:
        exchange: in which a kernel of the exchange was running, waiting included, on the device where they are most.
        exposed: in which nothing else was running, on the device where they are most.
        exposed_least: the same on the device where they are least.
    """

    exchange: float
    exposed: float
    exposed_least: float


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points, in intervals that don't touch.

    Example:
        >>> union([(4, 5), (0, 2), (1, 3)])
        [(0, 3), (4, 5)]
    """
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """Of all the points in the intervals.

    Example:
        >>> length([(0, 2), (1, 3), (4, 5)])
        4
    """
    return sum(end - start for start, end in union(intervals))


def uncovered(intervals: Sequence[Interval], cover: Sequence[Interval]) -> float:
    """Length of what `intervals` hold and `cover` doesn't.

    Example:
        >>> uncovered([(0, 4), (6, 8)], [(1, 2), (3, 7)])
        3
    """
    return length([*intervals, *cover]) - length(cover)


def exposure_in(profile: ProfileData, runs: int = 1) -> Exposure:
    """Reads a trace of `runs` runs.

    Args:
        profile: planes of devices with lines of kernels, as the profiler writes them for GPUs.
        runs: by which the times are divided.

    Raises:
        ValueError: no kernels of a GPU in the trace.
    """
    devices = []
    for plane in profile.planes:
        if not plane.name.startswith(_DEVICE):
            continue
        exchange, other = [], []
        for line in plane.lines:
            if line.name.startswith(_KERNELS):
                for event in line.events:
                    kind = exchange if any(word in event.name.lower() for word in _EXCHANGE) else other
                    kind.append((event.start_ns, event.start_ns + event.duration_ns))
        if exchange or other:
            devices.append((length(exchange) * 1e-9 / runs, uncovered(exchange, other) * 1e-9 / runs))
    if not devices:
        raise ValueError("profile: the trace holds no kernels of a GPU")
    exchange, exposed = zip(*devices, strict=True)
    return Exposure(max(exchange), max(exposed), min(exposed))


def measure_exposure(run: Callable[[], object], runs: int = 5) -> Exposure:
    """Runs a program under the profiler.

    Args:
        run: a compiled program that has run before.
        runs: how often.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(runs):
                jax.block_until_ready(run())
        (trace,) = Path(directory).rglob("*.xplane.pb")
        return exposure_in(ProfileData.from_file(str(trace)), runs)
