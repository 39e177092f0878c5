"""Meshes over the first devices of this machine."""

from collections.abc import Callable

import jax
import pytest
from jax.sharding import AxisType, Mesh

RANKS = (1, 2, 3, 5, 8)


def mesh(axis_type: AxisType = AxisType.Auto, **axes: int) -> Mesh:
    """A mesh with these axes, in order; skips the test where there are too few devices."""
    needed = 1
    for size in axes.values():
        needed *= size
    if jax.device_count() < needed:
        pytest.skip(f"needs {needed} devices, {jax.device_count()} here")
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (axis_type,) * len(axes), devices=jax.devices()[:needed])


def per_rank(function: Callable, ranks: int, *, check_vma: bool = True) -> Callable:
    """Run `function` on every rank of the axis "seq": each argument and result has a leading axis of ranks."""

    def local(*arguments):
        results = function(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: x[None], results)

    spec = jax.sharding.PartitionSpec("seq")
    return jax.shard_map(local, mesh=mesh(seq=ranks), in_specs=spec, out_specs=spec, check_vma=check_vma)
