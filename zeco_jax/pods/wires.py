"""How long a collective takes on the wires of a machine."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from zeco_jax.collectives.links import Link
from zeco_jax.pods.hlo import Collective

Coordinates = tuple[int, ...]


@dataclass(frozen=True)
class Torus:
    """Chips on a grid, each with a link to either neighbour along each axis.

    Attributes:
        coordinates: of each device, in the order in which the program numbers them.
        sizes: of the axes.
        rings: whether an axis closes into a ring.
    """

    coordinates: tuple[Coordinates, ...]
    sizes: tuple[int, ...]
    rings: tuple[bool, ...]

    def route(self, source: int, target: int) -> list[tuple[Coordinates, int, int]]:
        """The links (chip, axis, direction) from one device to another: axis by axis, the shorter way round.

        Example:
            >>> from zeco_jax.pods import Torus
            >>> line = Torus(((0,), (1,), (2,), (3,)), (4,), (True,))
            >>> line.route(0, 3), len(line.route(0, 2))
            ([((0,), 0, -1)], 2)
        """
        place = list(self.coordinates[source])
        links = []
        for axis, (size, ring) in enumerate(zip(self.sizes, self.rings, strict=True)):
            way = self.coordinates[target][axis] - place[axis]
            if ring and abs(way) > size / 2:
                way -= math.copysign(size, way)
            direction = 1 if way > 0 else -1
            for _ in range(int(abs(way))):
                links.append((tuple(place), axis, direction))
                place[axis] = (place[axis] + direction) % size
        return links

    @cached_property
    def out_links(self) -> float:
        """Links that lead away from a chip, on average."""
        return sum(
            2.0 if ring and size > 2 else 2.0 * (size - 1) / size
            for size, ring in zip(self.sizes, self.rings, strict=True)
        )

    @cached_property
    def mean_way(self) -> float:
        """Links between two chips, on average over all pairs."""
        return sum(
            size / 4 if ring else (size**2 - 1) / (3 * size) for size, ring in zip(self.sizes, self.rings, strict=True)
        )

    @property
    def diameter(self) -> int:
        """Links between the two chips that are furthest apart."""
        return sum(size // 2 if ring else size - 1 for size, ring in zip(self.sizes, self.rings, strict=True))


class Transit(NamedTuple):
    """A collective on its way.

    Attributes:
        latency: seconds that it takes however small it is; others may be on their way meanwhile.
        transfer: seconds in which it fills the wires.
    """

    latency: float
    transfer: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.latency + self.transfer


@dataclass(frozen=True)
class Wires:
    """What a collective takes if nothing else is under way.

    Attributes:
        link: what connects the devices.
        torus: where they sit; None: each reaches every other directly.
    """

    link: Link
    torus: Torus | None = None

    def transit(self, collective: Collective) -> Transit:
        """Of one collective.

        A permute takes as long as its busiest link; on a torus, messages go axis by axis, the shorter way round. An
        all-gather or a reduction uses all links of a torus at once, as the TPU compiler's algorithms do.
        """
        if collective.kind == "collective-permute":
            return self._permute(collective)
        link = self.link
        all_to_all = "all-to-all" in collective.kind
        latency = link.all_to_all_latency if all_to_all else link.gather_latency
        rate = (link.all_to_all_bandwidth if all_to_all else link.gather_bandwidth) or link.bandwidth
        phases = 2 if collective.kind == "all-reduce" else 1
        if self.torus is None:
            return Transit(phases * latency, collective.wire_bytes / rate)
        latency += link.hop_latency * self.torus.diameter
        ways = self.torus.mean_way if all_to_all else 1.0
        return Transit(phases * latency, ways * collective.wire_bytes / (rate * max(self.torus.out_links, 1.0)))

    def _permute(self, collective: Collective) -> Transit:
        link = self.link
        if not collective.pairs:
            return Transit(0.0, 0.0)
        load, length = self._busiest(collective.pairs)
        latency = link.permute_latency + (length - 1) * link.hop_latency
        return Transit(latency, load * collective.bytes / link.bandwidth)

    def _busiest(self, pairs: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        """Messages on the busiest link, and links of the longest way."""
        if self.torus is None:
            return 1, 1
        if pairs not in self._routed:
            routes = [self.torus.route(source, target) for source, target in pairs]
            load = Counter(link for route in routes for link in route)
            self._routed[pairs] = max(load.values(), default=1), max(1, *map(len, routes))
        return self._routed[pairs]

    @cached_property
    def _routed(self) -> dict[tuple[tuple[int, int], ...], tuple[int, int]]:
        return {}
