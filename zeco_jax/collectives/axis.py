"""Mesh axes by name: how many ranks, which one is this, and a clear error for a name that isn't in scope."""

import jax

AxisName = str | tuple[str, ...]


def axis_size(axis_name: AxisName) -> int:
    """Number of ranks along `axis_name`, a mesh axis or a tuple of them.

    Raises:
        ValueError: if the axis is not in scope, that is, outside a `jax.shard_map` over it.
    """
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name={axis_name!r} is not in scope: expected the name of a mesh axis (or a tuple of names) of the "
            "jax.shard_map that this call runs in; outside shard_map leave axis_name out or use "
            "sharded_linear_attention"
        ) from None
    except TypeError:
        raise TypeError(f"axis_name must be a string or a tuple of strings, got {axis_name!r}") from None


def axis_index(axis_name: AxisName) -> jax.Array:
    """This rank's position along `axis_name` (a tuple counts its last axis fastest)."""
    return jax.lax.axis_index(axis_name)
