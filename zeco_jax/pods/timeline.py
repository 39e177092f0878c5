"""How long a compiled program should take: its schedule, walked with a clock."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from zeco_jax.pods.chips import Chip
from zeco_jax.pods.hlo import Collective
from zeco_jax.pods.program import parse_program
from zeco_jax.pods.schedule import Schedule, Work
from zeco_jax.pods.wires import Wires


@dataclass(frozen=True)
class Rates:
    """How fast a device works on what a program asks for.

    Attributes:
        chip: the device.
        flops_fraction: of its peak, that matrix products reach.
        memory_fraction: of its memory's bandwidth.
        launch: seconds that each piece of work takes besides.
    """

    chip: Chip
    flops_fraction: float = 0.8
    memory_fraction: float = 0.8
    launch: float = 0.0

    def seconds(self, work: Work) -> float:
        """A piece of work takes as long as its products or as its bytes, whichever is more."""
        products = work.flops / (self.flops_fraction * self.chip.peak_flops)
        memory = work.bytes / (self.memory_fraction * self.chip.memory_bandwidth)
        return self.launch + max(products, memory)

    def compiler_seconds(self, work: Work) -> float:
        """As the TPU compiler estimates it; as by `seconds` for kernels written by hand, which it doesn't estimate."""
        return work.cycles / self.chip.clock if work.cycles else self.seconds(work)


class Wait(NamedTuple):
    """A collective of a program, over all its runs.

    Attributes:
        collective: what is sent.
        computation: where it stands.
        runs: how often it runs.
        wire: seconds on the wire.
        exposed: of those, seconds that the device has nothing else to do.
        hidden_by: seconds of work between its start and its end.
    """

    collective: Collective
    computation: str
    runs: int
    wire: float
    exposed: float
    hidden_by: float


class Timeline(NamedTuple):
    """What a program spends its time on.

    Attributes:
        work: seconds of computing.
        exposed: seconds of waiting for collectives.
        waits: the collectives, in the order in which they first start.
        flops: of the matrix products.
        bytes: read and written in memory.
        cycles: that the TPU compiler estimates for the computing.
    """

    work: float
    exposed: float
    waits: tuple[Wait, ...]
    flops: int
    bytes: int
    cycles: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.work + self.exposed


def timeline(compiled_text: str, seconds_of: Callable[[Work], float], wires: Wires) -> Timeline:
    """Walks a schedule: work takes its time, a collective is on its way from its start, its end waits for it.

    Collectives that are under way together share the wires: one's bytes go after the other's.

    Args:
        compiled_text: of a compiled program, whose order is the schedule.
        seconds_of: the time of a piece of work.
        wires: what connects the devices.

    Raises:
        ValueError: text that isn't scheduled.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from zeco_jax.collectives.links import HOST_CPU
        >>> from zeco_jax.pods import Wires, timeline
        >>> text = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile().as_text()
        >>> timeline(text, lambda work: work.flops / 1e9, Wires(HOST_CPU)).seconds
        0.000524288
    """
    schedule = Schedule(parse_program(compiled_text))
    return _Walk(schedule, seconds_of, wires).through(schedule.program.entry)


@dataclass(frozen=True)
class _Walk:
    schedule: Schedule
    seconds_of: Callable[[Work], float]
    wires: Wires

    def through(self, computation: str) -> Timeline:
        """One run of a computation."""
        now = work = exposed = wire_free = 0.0
        flops = size = cycles = 0
        under_way: dict[str, tuple[float, float, float, float, Collective]] = {}
        waits: dict[str, Wait] = {}
        for event in self.schedule.events(computation):
            if event.starts:
                transit = self.wires.transit(event.starts)
                wire_free = max(now, wire_free) + transit.transfer
                arrival = wire_free + transit.latency
                under_way[event.starts.name] = (arrival, transit.seconds, now, exposed, event.starts)
            if event.ends:
                arrival, wire, start, exposed_before, collective = under_way.pop(event.ends)
                waiting = max(arrival - now, 0.0)
                hidden_by = now - start - (exposed - exposed_before)
                waits[event.ends] = Wait(collective, computation, 1, wire, waiting, hidden_by)
                exposed += waiting
                now += waiting
            elif event.calls:
                inner = self._called(event)
                now += inner.seconds
                work, exposed = work + inner.work, exposed + inner.exposed
                flops, size, cycles = flops + inner.flops, size + inner.bytes, cycles + inner.cycles
                waits |= {f"{event.calls.name} {wait.collective.name}": wait for wait in inner.waits}
            elif event.work:
                seconds = self.seconds_of(event.work)
                now, work = now + seconds, work + seconds
                flops, size, cycles = flops + event.work.flops, size + event.work.bytes, cycles + event.work.cycles
        return Timeline(work, exposed, tuple(waits.values()), flops, size, cycles)

    def _called(self, event: object) -> Timeline:
        """All runs of a loop, or the longest branch."""
        runs = self.schedule.program.runs(event.calls)
        named = self.schedule.program.computations
        inner = max((self.through(name) for name in event.calls.called if name in named), key=lambda one: one.seconds)
        waits = tuple(
            wait._replace(runs=runs * wait.runs, wire=runs * wait.wire, exposed=runs * wait.exposed,
                          hidden_by=runs * wait.hidden_by)
            for wait in inner.waits
        )  # fmt: skip
        return Timeline(
            runs * inner.work, runs * inner.exposed, waits, runs * inner.flops, runs * inner.bytes, runs * inner.cycles
        )
