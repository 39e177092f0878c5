"""What the links between this machine's devices deliver: the constants of the cost model, measured one by one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.measuring import Timing, interleaved
from zeco_jax.collectives.links import Network, default_network

WIDTH = 128
LARGE = {"cpu": 1 << 13, "gpu": 1 << 17, "tpu": 1 << 17}
"""Rows of 512 bytes that a rank holds when bandwidth is measured, by platform: 4 MiB or 64 MiB."""


def chained(step: Callable[[jax.Array], jax.Array], mesh: Mesh, repeats: int) -> Callable[[jax.Array], jax.Array]:
    """A program that takes `step` on each rank's rows `repeats` times, one after the other.

    Args:
        step: [R, V] -> [R, V], called inside shard_map with the mesh's axes in scope.
        mesh: its axes together share out the rows.
        repeats: how often; what a call costs on the host is shared by all.
    """

    def local(rows: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, rows: step(rows), rows)

    spec = PartitionSpec(mesh.axis_names)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def primitives(ranks: int) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """The collectives that schedules are made of, each as a step from [R, V] to [R, V], and a rank's local work."""
    shift = [(rank, (rank + 1) % ranks) for rank in range(ranks)]

    def gather(rows: jax.Array) -> jax.Array:
        # Everybody's rows have to arrive; the next step depends on all of them.
        return jax.lax.all_gather(rows, "ranks").sum(0)

    def all_to_all(rows: jax.Array) -> jax.Array:
        cut = rows.reshape(ranks, -1, rows.shape[-1])
        return jax.lax.all_to_all(cut, "ranks", 0, 0).reshape(rows.shape)

    return {
        "permute": lambda rows: jax.lax.ppermute(rows, "ranks", shift),
        "gather": gather,
        "all-to-all": all_to_all,
        "local": lambda rows: rows * 0.5 + 1.0,
    }


def measure_primitives(devices: Sequence[jax.Device], rows: int, *, repeats: int, budget: float) -> dict[str, Timing]:
    """Seconds of one step of each primitive, when each rank holds this many rows."""
    ranks = len(devices)
    mesh = jax.make_mesh((ranks,), ("ranks",), (AxisType.Auto,), devices=devices)
    array = jax.device_put(jnp.ones((rows * ranks, WIDTH), jnp.float32), NamedSharding(mesh, PartitionSpec("ranks")))
    programs = {name: chained(step, mesh, repeats).lower(array).compile() for name, step in primitives(ranks).items()}
    runs = {name: partial(program, array) for name, program in programs.items()}
    timings = interleaved(runs, budget=budget, fewest=5, most=200)
    return {name: timing.divided_by(repeats) for name, timing in timings.items()}


def measure_network(devices: Sequence[jax.Device], *, budget: float) -> Network:
    """The links between these devices, all of which are taken to share a node.

    A latency is the time of a collective on next to nothing; a bandwidth follows from what it takes longer
    for megabytes. Virtual devices share what the machine can do, so that theirs are rates of the whole.

    Args:
        devices: between which to measure.
        budget: seconds to spend.

    Raises:
        ValueError: fewer than two devices.
    """
    ranks = len(devices)
    if ranks < 2:
        raise ValueError(f"devices: a calibration needs at least 2, got {ranks}")
    platform = devices[0].platform
    small = measure_primitives(devices, ranks, repeats=64, budget=budget / 2)
    # An all-to-all needs as many rows for each rank.
    rows = -(-LARGE[platform] // ranks) * ranks
    large = measure_primitives(devices, rows, repeats=4 if platform == "cpu" else 32, budget=budget / 2)
    held = rows * WIDTH * 4
    shared = platform == "cpu"
    parts = ranks if shared else 1
    step = small["local"].median
    extra = {name: max(large[name].median - small[name].median, 1e-9) for name in large}
    memory = 2 * held / extra["local"]
    # The rows that have arrived are summed up.
    extra["gather"] = max(extra["gather"] - (ranks + 1) * held / memory, 0.1 * extra["gather"])
    default = default_network(platform, devices[0].device_kind)
    inside = replace(
        default.inside,
        name=f"{devices[0].device_kind} x {ranks}",
        permute_latency=max(small["permute"].median - step, 0.0) / parts,
        gather_latency=max(small["gather"].median - step, 0.0) / parts,
        all_to_all_latency=max(small["all-to-all"].median - step, 0.0) / parts,
        bandwidth=held / extra["permute"] * parts,
        memory_bandwidth=memory * parts,
        gather_bandwidth=(ranks - 1) * held / extra["gather"] * parts,
        all_to_all_bandwidth=(ranks - 1) / ranks * held / extra["all-to-all"] * parts,
        step_latency=step / parts,
        shared=shared,
        source=f"measured on {ranks} devices, jax {jax.__version__}; hop, block and spill: of {default.inside.name}",
    )
    return Network(inside, inside if shared else default.across, default.node_size)
