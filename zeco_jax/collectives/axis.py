"""Mesh axes by name: how many ranks, which one is this, and a clear error for a name that isn't in scope."""

import jax

AxisName = str | tuple[str, ...]


def axis_size(axis_name: AxisName) -> int:
    """Number of ranks along `axis_name`, a mesh axis or a tuple of them.

    Raises:
        TypeError: if `axis_name` is neither a string nor a tuple of strings.
        ValueError: if the axis is not in scope, that is, outside a `jax.shard_map` over it.
    """
    axis_names(axis_name)
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name={axis_name!r} is not in scope: expected the name of a mesh axis (or a tuple of names) of the "
            "jax.shard_map that this call runs in; outside shard_map leave axis_name out or use "
            "sharded_linear_attention"
        ) from None


def axis_tuple(axis_name: AxisName) -> tuple[str, ...]:
    """The mesh axes that `axis_name` names, slowest first."""
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def axis_names(axis_name: AxisName) -> frozenset[str]:
    """The mesh axes that `axis_name` names.

    Raises:
        TypeError: if `axis_name` is neither a string nor a tuple of strings.
    """
    names = axis_tuple(axis_name)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must be the name of a mesh axis or a tuple of names, got {axis_name!r}")
    return frozenset(names)


def axis_index(axis_name: AxisName) -> jax.Array:
    """This rank's position along `axis_name` (a tuple counts its last axis fastest)."""
    return jax.lax.axis_index(axis_name)
