"""Where the arrays of a layer lie."""

import jax
from jax.sharding import PartitionSpec

from zeco_jax.parallel import SequenceSharding


def divides(sharding: SequenceSharding | None, x: jax.Array) -> bool:
    """Whether `x` [B, T, ...] can be cut as `sharding` says; never if there is none."""
    if sharding is None:
        return False
    batch, tokens = x.shape[:2]
    return batch % sharding.size(sharding.batch) == 0 and tokens % sharding.size(sharding.seq) == 0


def by_batch[Tree](sharding: SequenceSharding | None, tree: Tree) -> Tree:
    """Arrays [B, ...] cut along B if `sharding` does and can, otherwise, like scalars, whole on every device."""
    if sharding is None:
        return tree

    def place(x: jax.Array) -> jax.Array:
        cut = x.ndim and x.shape[0] % sharding.size(sharding.batch) == 0
        return sharding.place(x, PartitionSpec(sharding.batch) if cut else PartitionSpec())

    return jax.tree.map(place, tree)


def constrain(sharding: SequenceSharding | None, x: jax.Array | None) -> jax.Array | None:
    """`x` [B, T, ...] cut as `sharding` says, or as it is if either is missing."""
    return x if sharding is None or x is None else sharding.constrain(x)
