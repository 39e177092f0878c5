"""The tail of the left neighbour's shard, for operators that look a few tokens back."""

import jax
import jax.numpy as jnp

from zeco_jax.collectives.axis import AxisName, axis_size


def halo(x: jax.Array, width: int, axis_name: AxisName, *, axis: int = 1) -> jax.Array:
    r"""The last `width` tokens before this rank's shard, taken from the ranks on its left.

    With the shards of all ranks joined in rank order, rank p gets the `width` tokens that end where its own shard
    begins; positions before rank 0 hold zeros. Shards shorter than `width` are served by as many hops as it takes.
    Each rank sends `width` tokens in all. Differentiable: the transpose adds the cotangents to the tokens' owners.

    Args:
        x: this rank's shard, any dtype; tokens along `axis`.
        width: number of tokens, >= 0 (a causal convolution of W taps needs W - 1).
        axis_name: mesh axis, or tuple of axes, along which the tokens are sharded.
        axis: position of the tokens' dimension in `x`.

    Returns:
        Array like `x` with `width` tokens along `axis`.

    Raises:
        ValueError: if `width` is negative, `axis` isn't one of x's dimensions or `axis_name` is not in scope.
        TypeError: if `width` is no integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> from zeco_jax.collectives import halo
        >>> mesh = jax.make_mesh((4,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:4])
        >>> left = jax.shard_map(lambda x: halo(x, 2, "seq"), mesh=mesh, in_specs=P(None, "seq"),
        ...                      out_specs=P(None, "seq"))
        >>> print(left(jnp.arange(12.0).reshape(1, 12)))
        [[0. 0. 1. 2. 4. 5. 7. 8.]]
    """
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"width must be an integer, got {width!r}")
    if width < 0:
        raise ValueError(f"width must be at least 0, got {width}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be one of the {x.ndim} dimensions of x, got {axis} for shape {x.shape}")
    ranks = axis_size(axis_name)
    length = x.shape[axis]
    if length == 0 and width > 0:
        raise ValueError(f"x has no tokens along axis {axis} (shape {x.shape}); halo needs at least one per rank")
    pieces = []
    missing, distance = width, 1
    while missing > 0:
        take = min(missing, length)
        tail = jax.lax.slice_in_dim(x, length - take, length, axis=axis)
        # ppermute gives zeros to ranks without a source: what lies before the first token.
        pairs = [(rank, rank + distance) for rank in range(ranks - distance)]
        pieces.append(jax.lax.ppermute(tail, axis_name, pairs) if pairs else jnp.zeros_like(tail))
        missing, distance = missing - take, distance + 1
    if not pieces:
        return jax.lax.slice_in_dim(x, 0, 0, axis=axis)
    return jnp.concatenate(pieces[::-1], axis=axis)
