"""The chain: ZeCO's All-Scan, states passed from rank to rank in pipelined blocks (arXiv 2507.01004, section 3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from zeco_jax.collectives.axis import Axis, axis_size, permute
from zeco_jax.collectives.maps import AffineMap, position_along, shift_pairs


def chain_scan(
    apply: Callable[[jax.Array, jax.Array], jax.Array], entering: jax.Array, axis_name: Axis, *, reverse: bool
) -> jax.Array:
    """Exclusive scan of any maps of states: at step s the rank at place p sends block s - p, updated, to place p + 1.

    Each rank sends and receives every block once, so one state crosses each link, whatever P is. All that a rank needs
    to know of its map is how to apply it to a block.

    Args:
        apply: `(block of the entering state, its index) -> block of the leaving state`.
        entering: [blocks, ...], what enters the first place; zeros on all other ranks.
        axis_name: mesh axis, tuple of axes or part of an axis.
        reverse: pass the states from the last rank to the first.

    Returns:
        [blocks, ...], the state that enters this rank.
    """
    ranks = axis_size(axis_name)
    blocks = entering.shape[0]
    position = position_along(axis_name, reverse=reverse)
    links = shift_pairs(ranks, 1, reverse=reverse)
    for step in range(ranks - 2 + blocks if ranks > 1 else 0):
        sent = jnp.clip(step - position, 0, blocks - 1)
        leaving = apply(jax.lax.dynamic_index_in_dim(entering, sent, keepdims=False), sent)
        # Only places that hold a finished block send; nobody ships filler.
        active = [link for place, link in enumerate(links) if 0 <= step - place < blocks]
        arrived = permute(leaving, axis_name, active)
        # Ranks that nobody sends to in this step get zeros, which add nothing wherever they land.
        entering = entering.at[jnp.clip(step - position + 1, 0, blocks - 1)].add(arrived)
    return entering


def chain_of_rows(own: AffineMap, initial: jax.Array, axis_name: Axis, *, blocks: int, reverse: bool) -> jax.Array:
    """The chain for maps whose rows don't mix, cut along the rows.

    Args:
        own: this rank's map.
        initial: [R, V], what enters the first rank; other ranks' values are ignored.
        axis_name: mesh axis, tuple of axes or part of an axis.
        blocks: number of blocks, at most R (more are cut down to R).
        reverse: pass the states from the last rank to the first.

    Returns:
        [R, V], the state that enters this rank.
    """
    rows = own.state.shape[0]
    blocks = min(blocks, rows)
    block_rows = -(-rows // blocks)
    padding = blocks * block_rows - rows

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)) if padding else x
        return padded.reshape(blocks, block_rows, *x.shape[1:])

    maps = jax.tree.map(cut, own)

    def apply(block: jax.Array, index: jax.Array) -> jax.Array:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), maps)(block)

    first = position_along(axis_name, reverse=reverse) == 0
    entering = chain_scan(apply, cut(jnp.where(first, initial, 0)), axis_name, reverse=reverse)
    return entering.reshape(blocks * block_rows, -1)[:rows]
