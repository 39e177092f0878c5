"""What an exchange costs: links, rounds and bytes for each schedule, and the schedule that should be fastest.

Times are `latency x rounds + bytes / bandwidth + local work`. The bytes are those that the tests count
in the compiled program.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from zeco_jax.collectives.doubling import doubling_distances

NETWORK_VARIABLE = "ZECO_JAX_NETWORK"
FLAT_SCHEDULES = ("chain", "doubling", "gather", "transpose")


@dataclass(frozen=True)
class Link:
    """What connects the ranks along one mesh axis.

    Attributes:
        name: what it is.
        permute_latency: seconds of a collective-permute of next to nothing.
        gather_latency: the same for an all-gather.
        all_to_all_latency: the same for an all-to-all.
        bandwidth: bytes per second that a rank can send, while it receives as much.
        memory_bandwidth: bytes per second that a rank reads and writes in its local part of a scan.
        ring: ranks sit on a ring with a link to either neighbour (a torus axis), instead of on a switch.
        source: where the figures come from.
    """

    name: str
    permute_latency: float
    gather_latency: float
    all_to_all_latency: float
    bandwidth: float
    memory_bandwidth: float
    ring: bool = False
    source: str = ""


NVLINK = Link(
    "nvlink",
    permute_latency=22e-6,
    gather_latency=30e-6,
    all_to_all_latency=30e-6,
    bandwidth=224e9,
    memory_bandwidth=2.5e12,
    source="ppermute and all_gather of jax 0.11.2 on two H200s; all-to-all assumed to be like the all-gather",
)
INFINIBAND = Link(
    "infiniband",
    permute_latency=30e-6,
    gather_latency=45e-6,
    all_to_all_latency=60e-6,
    bandwidth=45e9,
    memory_bandwidth=2.5e12,
    source="400 Gbit/s NDR at 90% of line rate, one port per GPU; latencies assumed, NCCL's launch included",
)
ICI = Link(
    "ici",
    permute_latency=2e-6,
    gather_latency=4e-6,
    all_to_all_latency=4e-6,
    bandwidth=90e9,
    memory_bandwidth=2.0e12,
    ring=True,
    source="one direction of one v5p link: 4800 Gbit/s per chip over 6 links; hop latency assumed, not measured",
)
HOST_CPU = Link(
    "host-cpu",
    permute_latency=150e-6,
    gather_latency=150e-6,
    all_to_all_latency=150e-6,
    bandwidth=1.5e9,
    memory_bandwidth=3e9,
    source="8 virtual devices on 4 shared cores; run python -m experiments.collectives --calibrate for your own",
)
LINKS = {link.name: link for link in (NVLINK, INFINIBAND, ICI, HOST_CPU)}


@dataclass(frozen=True)
class Network:
    """The links of a machine, by the kind of mesh axis.

    Attributes:
        inside: along an axis whose ranks share a node (or along an axis of a torus).
        across: along an axis that leaves the node.
        node_size: ranks that a node holds.
    """

    inside: Link
    across: Link
    node_size: int

    def links(self, sizes: Sequence[int]) -> tuple[Link, ...]:
        """The link of each axis, for axes given slowest first: the fast ones stay in a node as long as they fit."""
        links: list[Link] = []
        ranks = 1
        for size in reversed(sizes):
            ranks *= size
            links.append(self.inside if ranks <= self.node_size else self.across)
        return tuple(reversed(links))

    def save(self, path: Path) -> None:
        """Writes the network as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def load_network(path: Path) -> Network:
    """Reads a network that `Network.save` wrote.

    Raises:
        ValueError: the file can't be read or doesn't describe a network.
    """
    try:
        fields = json.loads(Path(path).read_text())
        return Network(Link(**fields["inside"]), Link(**fields["across"]), int(fields["node_size"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"network: {str(path)!r} can't be read as the JSON of a calibration (python -m experiments.collectives "
            f"--calibrate): {error}"
        ) from error


def default_network(platform: str) -> Network:
    """The network of a platform: the file that the environment variable ZECO_JAX_NETWORK names, or a documented guess.

    Args:
        platform: "cpu", "gpu" or "tpu".
    """
    if path := os.environ.get(NETWORK_VARIABLE):
        return load_network(Path(path))
    if platform == "cpu":
        return Network(HOST_CPU, HOST_CPU, node_size=1 << 30)
    if platform == "tpu":
        return Network(ICI, ICI, node_size=1 << 30)
    return Network(NVLINK, INFINIBAND, node_size=8)


class Payload(NamedTuple):
    """What a scan moves.

    Attributes:
        rows: rows R of the state, over all its heads, that the decay acts on one by one.
        width: numbers V of a row.
        itemsize: bytes of a number.
    """

    rows: int
    width: int
    itemsize: int = 4

    @property
    def state_bytes(self) -> int:
        """Bytes of a state."""
        return self.rows * self.width * self.itemsize

    @property
    def map_bytes(self) -> int:
        """Bytes of a state and its decay."""
        return self.rows * (self.width + 1) * self.itemsize

    def share(self, ranks: int) -> "Payload":
        """The share of the rows that each of `ranks` holds."""
        return self._replace(rows=-(-self.rows // ranks))


class Cost(NamedTuple):
    """What one rank does in a scan.

    Attributes:
        rounds: collectives one after the other.
        bytes_sent: bytes that a rank in the middle puts on the wire.
        seconds: predicted time.
    """

    rounds: int
    bytes_sent: int
    seconds: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.rounds + other.rounds, self.bytes_sent + other.bytes_sent, self.seconds + other.seconds)


class Choice(NamedTuple):
    """How to run an All-Scan.

    Attributes:
        schedule: "chain", "doubling", "gather", "transpose" or "hierarchical".
        blocks: blocks of the chain, on the slowest axis if hierarchical; 1 for other schedules.
        slowest: schedule of the slowest axis of a hierarchical scan; otherwise the same as `schedule`.
        cost: what is predicted; None where nothing was compared.
    """

    schedule: str
    blocks: int
    slowest: str
    cost: Cost | None = None


def chain_blocks(payload: Payload, ranks: int, link: Link) -> int:
    """Number of pipeline blocks that makes the chain fastest, as a divisor of the state's rows.

    A chain of P ranks and K blocks takes `(P - 2 + K) (a + B / (K w))` for B bytes, latency a and bandwidth w a hop;
    the minimum is at `K = sqrt((P - 2) B / (w a))` (ZeCO, arXiv 2507.01004, section 3). What a rank does to a block
    before it sends it counts with the hop.
    """
    seconds_per_byte = 1 / link.bandwidth + 3 / link.memory_bandwidth
    best = math.sqrt(max(ranks - 2, 0) * payload.state_bytes * seconds_per_byte / link.permute_latency)
    divisors = {
        d for i in range(1, math.isqrt(payload.rows) + 1) if payload.rows % i == 0 for d in (i, payload.rows // i)
    }
    return min(divisors, key=lambda blocks: (abs(math.log(blocks / max(best, 1.0))), blocks))


def cost_of(schedule: str, payload: Payload, ranks: int, link: Link, blocks: int = 1) -> Cost:
    """Rounds, bytes and predicted time of a scan along one axis.

    Args:
        schedule: "chain", "serial", "doubling", "gather" or "transpose".
        payload: what it moves.
        ranks: number of ranks P.
        link: what connects them.
        blocks: blocks of the chain.

    Raises:
        ValueError: an unknown schedule.
    """
    state, whole = payload.state_bytes, payload.map_bytes
    if ranks == 1:
        return Cost(0, 0, 0.0)
    if schedule in ("chain", "serial"):
        blocks = 1 if schedule == "serial" else min(blocks, payload.rows)
        block = -(-payload.rows // blocks) * payload.width * payload.itemsize
        rounds = ranks - 2 + blocks
        return Cost(rounds, blocks * block, rounds * _hop(link, block, local=3 * block))
    if schedule == "doubling":
        distances = doubling_distances(ranks)
        sizes = [whole] * (len(distances) - 1) + [state]
        seconds = sum(_hop(link, size, local=4 * size, distance=d) for d, size in zip(distances, sizes, strict=True))
        return Cost(len(distances), sum(sizes), seconds)
    if schedule == "gather":
        sent = (ranks - 1) * whole
        # A ring brings half of the maps from either side.
        wire = sent / link.bandwidth / (2 if link.ring else 1)
        local = 3 * ranks * whole / link.memory_bandwidth
        return Cost(1, sent, link.gather_latency + wire + local)
    if schedule == "transpose":
        return transpose_cost(payload, ranks, link) + Cost(0, 0, 3 * whole / link.memory_bandwidth)
    raise ValueError(f"unknown schedule {schedule!r}: expected one of {', '.join(map(repr, FLAT_SCHEDULES))}")


def transpose_cost(payload: Payload, ranks: int, link: Link) -> Cost:
    """The two all-to-alls that share out the rows of the maps and bring the entering states back."""
    share = payload.share(ranks)
    sent = (ranks - 1) * (share.map_bytes + share.state_bytes)
    # On a ring the average way is P / 4 hops, and a rank has two links.
    wire = sent / link.bandwidth * (ranks / 8 if link.ring else 1)
    local = 4 * (payload.map_bytes + payload.state_bytes) / link.memory_bandwidth
    return Cost(2, sent, 2 * link.all_to_all_latency + wire + local)


def hierarchical_cost(
    payload: Payload, sizes: Sequence[int], links: Sequence[Link], slowest: str, blocks: int = 1
) -> Cost:
    """Rounds, bytes and predicted time of a hierarchical scan over axes of these sizes, slowest first."""
    if len(sizes) == 1:
        return cost_of(slowest, payload, sizes[0], links[0], blocks)
    inside = transpose_cost(payload, sizes[-1], links[-1])
    local = Cost(0, 0, 6 * payload.map_bytes / links[-1].memory_bandwidth)
    return inside + local + hierarchical_cost(payload.share(sizes[-1]), sizes[:-1], links[:-1], slowest, blocks)


def choose(payload: Payload, sizes: Sequence[int], network: Network) -> Choice:
    """The schedule that should be fastest.

    Args:
        payload: what the scan moves.
        sizes: sizes of the mesh axes, slowest first.
        network: what connects the ranks.

    Example:
        >>> from zeco_jax.collectives.cost import INFINIBAND, NVLINK, Network, Payload, choose
        >>> choice = choose(Payload(rows=16 * 128, width=256), (32, 8), Network(NVLINK, INFINIBAND, node_size=8))
        >>> choice.schedule, choice.slowest, choice.cost.seconds < 0.55e-3
        ('hierarchical', 'doubling', True)
    """
    ranks = math.prod(sizes)
    # A scan that takes all axes for one goes at the pace of the slowest link.
    link = network.links((ranks,))[0]
    choices = [_flat_choice(name, payload, ranks, link) for name in FLAT_SCHEDULES]
    if len(sizes) > 1:
        choices.append(choose_hierarchical(payload, sizes, network))
    return min(choices, key=lambda choice: choice.cost.seconds)


def choose_hierarchical(payload: Payload, sizes: Sequence[int], network: Network) -> Choice:
    """The best schedule of the slowest axis in a hierarchical scan."""
    links = network.links(sizes)
    share = payload
    for size in sizes[1:]:
        share = share.share(size)
    choices = []
    for name in FLAT_SCHEDULES:
        blocks = chain_blocks(share, sizes[0], links[0]) if name == "chain" else 1
        choices.append(Choice("hierarchical", blocks, name, hierarchical_cost(payload, sizes, links, name, blocks)))
    return min(choices, key=lambda choice: choice.cost.seconds)


def _flat_choice(schedule: str, payload: Payload, ranks: int, link: Link) -> Choice:
    blocks = chain_blocks(payload, ranks, link) if schedule == "chain" else 1
    return Choice(schedule, blocks, schedule, cost_of(schedule, payload, ranks, link, blocks))


def _hop(link: Link, size: int, *, local: int, distance: int = 1) -> float:
    # On a ring, messages that go d ranks far share each link with d - 1 others; the way round may be shorter.
    wire = size / link.bandwidth * (distance if link.ring else 1)
    return link.permute_latency + wire + local / link.memory_bandwidth
