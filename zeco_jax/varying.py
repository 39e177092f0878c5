"""Which mesh axes an array varies over inside `jax.shard_map`, and how to make several arrays agree."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """Returns the mesh axes over which any of the arrays varies; empty outside `shard_map` or without `check_vma`."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def cast_varying(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Marks `array` as varying over `axes` too; the transpose sums the cotangents over the axes that were added."""
    missing = tuple(sorted(axes - varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def match_varying(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Marks every array as varying over the union of their axes, as scans and custom gradients need it."""
    axes = varying_axes(*arrays)
    return [cast_varying(array, axes) for array in arrays]


def zeros_varying(shape: Sequence[int], dtype: jnp.dtype, like: jax.Array) -> jax.Array:
    """Zeros that vary over the same mesh axes as `like`: what a scan under `check_vma` needs to start from."""
    return cast_varying(jnp.zeros(shape, dtype), varying_axes(like))
