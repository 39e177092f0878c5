"""What connects ranks: links by kind, with the sources of their constants, and the network of a machine."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from zeco_jax.platforms import device_in_scope

NETWORK_VARIABLE = "ZECO_JAX_NETWORK"


@dataclass(frozen=True)
class Link:
    """What connects the ranks along one mesh axis.

    Attributes:
        name: what it is.
        permute_latency: seconds of a collective-permute of next to nothing.
        gather_latency: the same for an all-gather.
        all_to_all_latency: the same for an all-to-all.
        bandwidth: bytes per second that a rank sends in a permute, while it receives as much.
        memory_bandwidth: bytes per second that a rank reads and writes in its local part of a scan.
        gather_bandwidth: bytes per second that a rank sends in an all-gather; 0: `bandwidth`.
        all_to_all_bandwidth: the same for an all-to-all.
        hop_latency: seconds more for each further rank, that a message passes on a ring or that an all-gather or an
            all-to-all has to serve.
        step_latency: seconds of the local part of a round on next to nothing (launches of kernels).
        block_latency: seconds more that a hop takes in a chain of several blocks, which are cut out and put back.
        spill_bytes: what one operation can touch at this pace; on a CPU, about what the caches hold.
        spill_bandwidth: bytes per second at which what exceeds `spill_bytes` adds to the time; 0: nothing is added.
        ring: ranks sit on a ring with a link to either neighbour (a torus axis), instead of on a switch.
        shared: the ranks are virtual and share one machine, whose rates `bandwidth` and the others are: each rank gets
            its part of them, and latencies grow with their number.
        source: where the figures come from.
    """

    name: str
    permute_latency: float
    gather_latency: float
    all_to_all_latency: float
    bandwidth: float
    memory_bandwidth: float
    gather_bandwidth: float = 0.0
    all_to_all_bandwidth: float = 0.0
    hop_latency: float = 0.0
    step_latency: float = 0.0
    block_latency: float = 0.0
    spill_bytes: float = 0.0
    spill_bandwidth: float = 0.0
    ring: bool = False
    shared: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("bandwidth", "memory_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not value >= 0:
                raise ValueError(f"{field.name} must not be negative, got {value}")

    def among(self, ranks: int) -> "Link":
        """What each of `ranks` gets of it: a part if it is shared, otherwise all."""
        if not self.shared:
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        latencies = {name: value * ranks for name, value in values.items() if name.endswith("latency")}
        rates = {name: value / ranks for name, value in values.items() if name.endswith("bandwidth")}
        return replace(self, **latencies, **rates, spill_bytes=self.spill_bytes / ranks, shared=False)

    def spill(self, size: int) -> float:
        """Seconds more that an operation on `size` bytes takes for being so large."""
        return max(size - self.spill_bytes, 0) / self.spill_bandwidth if self.spill_bandwidth else 0.0


NVLINK = Link(
    "nvlink",
    permute_latency=20e-6,
    gather_latency=30e-6,
    all_to_all_latency=30e-6,
    bandwidth=224e9,
    memory_bandwidth=0.9e12,
    hop_latency=0.47e-6,
    step_latency=12e-6,
    block_latency=12e-6,
    source=(
        "measured on two H200s with jax 0.11.2: latencies of small exchanges (all-to-all: that of the all-gather), "
        "bandwidth of a permute of 64 MiB (line rate: 450 GB/s each way, NVIDIA H100 data sheet), memory and the local "
        "part from whole scans; hop: a step of NCCL's ring (src/graph/tuning.cc, low-latency protocol)"
    ),
)
INFINIBAND = Link(
    "infiniband",
    permute_latency=26e-6,
    gather_latency=36e-6,
    all_to_all_latency=36e-6,
    bandwidth=45e9,
    memory_bandwidth=0.9e12,
    gather_bandwidth=63e9,
    hop_latency=2.7e-6,
    step_latency=12e-6,
    block_latency=12e-6,
    source=(
        "bandwidth: 400 Gbit/s NDR at 90% of line rate, one port per GPU (NVIDIA DGX H100 user guide); latencies: "
        "those of nvlink and the 6 us that NCCL adds for the network (src/graph/tuning.cc: 9.6 against 3.4 us, simple "
        "protocol), hop: a step of its ring (2.7 us, low-latency protocol); gather: 510 MiB in 8.5 ms on 256 H100s "
        "(ZeCO, arXiv 2507.01004); nothing measured here"
    ),
)


def _ici(generation: str, bandwidth: float, memory_bandwidth: float, documented: str) -> Link:
    return Link(
        f"ici-{generation}",
        permute_latency=2e-6,
        gather_latency=3e-6,
        all_to_all_latency=3e-6,
        bandwidth=bandwidth,
        memory_bandwidth=memory_bandwidth,
        hop_latency=1e-6,
        step_latency=1e-6,
        block_latency=1e-6,
        ring=True,
        source=(
            f"one direction of one link at 90% of line rate ({documented}), memory at 80% "
            f"(docs.cloud.google.com/tpu/docs/{generation}); hop: 1 us (jax-ml.github.io/scaling-book, sharding); "
            "start of a collective and of a local operation: assumed, not measured"
        ),
    )


ICI_V4 = _ici("v4", 45e9, 0.96e12, "2400 Gbit/s per chip over 6 links")
ICI_V5P = _ici("v5p", 90e9, 2.2e12, "4800 Gbit/s per chip over 6 links")
ICI_V5E = _ici("v5e", 45e9, 0.65e12, "1600 Gbit/s per chip over 4 links")
ICI_V6E = _ici("v6e", 90e9, 1.3e12, "800 GB/s per chip, both directions, over 4 links")
HOST_CPU = Link(
    "host-cpu",
    permute_latency=15e-6,
    gather_latency=15e-6,
    all_to_all_latency=8e-6,
    bandwidth=11.5e9,
    memory_bandwidth=12.8e9,
    gather_bandwidth=30e9,
    all_to_all_bandwidth=16e9,
    step_latency=1.1e-6,
    block_latency=1.1e-6,
    spill_bytes=30e6,
    spill_bandwidth=0.9e9,
    shared=True,
    source=(
        "fitted to the times of all schedules on 2, 4 and 8 virtual devices, 64 KiB ... 64 MiB, jax 0.12, on 4 cores "
        "of an AMD EPYC that were busy with other work too (32 MiB of third-level cache)"
    ),
)
LINKS = {link.name: link for link in (NVLINK, INFINIBAND, ICI_V4, ICI_V5P, ICI_V5E, ICI_V6E, HOST_CPU)}
"""All links whose constants are known, by name."""


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
        """The link of each axis, for axes given slowest first: the fast ones stay in a node as long as they fit.

        Example:
            >>> from zeco_jax.collectives.links import INFINIBAND, NVLINK, Network
            >>> [link.name for link in Network(NVLINK, INFINIBAND, node_size=8).links((32, 2, 4))]
            ['infiniband', 'nvlink', 'nvlink']
        """
        links: list[Link] = []
        ranks = 1
        for size in reversed(sizes):
            ranks *= size
            links.append(self.inside if ranks <= self.node_size else self.across)
        total = math.prod(sizes)
        return tuple(link.among(total) for link in reversed(links))

    def save(self, path: Path) -> None:
        """Writes the network as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


EVERYWHERE = 1 << 30
"""A node size that no mesh exceeds."""

GPU_NODES = Network(NVLINK, INFINIBAND, node_size=8)
"""Nodes of eight GPUs, NVLink inside and InfiniBand across."""

HOST = Network(HOST_CPU, HOST_CPU, node_size=EVERYWHERE)
"""Virtual devices of one machine."""


def torus(link: Link) -> Network:
    """The network of a TPU slice: the same links along all axes."""
    return Network(link, link, node_size=EVERYWHERE)


def load_network(path: Path) -> Network:
    """Reads a network that `Network.save` wrote.

    Raises:
        ValueError: the file can't be read or doesn't describe a network.
    """
    try:
        entries = json.loads(Path(path).read_text())
        return Network(Link(**entries["inside"]), Link(**entries["across"]), int(entries["node_size"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"network: {str(path)!r} can't be read as the JSON of a calibration (python -m experiments.collectives "
            f"--calibrate): {error}"
        ) from error


def default_network(platform: str, device_kind: str = "") -> Network:
    """The network of a platform: the file that the environment variable ZECO_JAX_NETWORK names, or a documented guess.

    Args:
        platform: "cpu", "gpu" (or "cuda", "rocm") or "tpu".
        device_kind: what JAX calls the device, which tells a TPU's generation; where it is unknown, v5p.

    Example:
        >>> from zeco_jax.collectives.links import default_network
        >>> default_network("tpu", "TPU v5 lite").inside.name
        'ici-v5e'
    """
    if path := os.environ.get(NETWORK_VARIABLE):
        return load_network(Path(path))
    if platform == "cpu":
        return HOST
    if platform != "tpu":
        return GPU_NODES
    kind = device_kind.lower()
    generations = (("v4", ICI_V4), ("v5 lite", ICI_V5E), ("v5e", ICI_V5E), ("v6", ICI_V6E))
    return torus(next((link for name, link in generations if name in kind), ICI_V5P))


def network_in_scope() -> Network:
    """The network of the mesh in whose `jax.shard_map` this is called.

    Its devices need not be here: a program may be compiled for a pod.
    """
    return default_network(*device_in_scope())
