"""Ranks that work one after the other: LASP-1's ring (arXiv 2404.02882), kept for comparison."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from zeco_jax.collectives.axis import AxisName, axis_size
from zeco_jax.collectives.maps import position_along, shift_pairs
from zeco_jax.varying import zeros_varying


def take_turns[Results](
    work: Callable[[jax.Array], tuple[Results, jax.Array]], first: jax.Array, axis_name: AxisName, *, reverse: bool
) -> tuple[Results, jax.Array]:
    """Each rank waits for the state from the one before it, does its work, and sends on the state that leaves.

    The work is compiled once for each rank's turn; every rank runs it in its own turn alone.

    Args:
        work: `entering state -> (results, leaving state)`; no collectives in it.
        first: the state that enters the first rank (the last one with `reverse`); other ranks' values are ignored.
        axis_name: mesh axis or tuple of axes.
        reverse: begin with the last rank.

    Returns:
        This rank's results, and the state that entered it.
    """
    position = position_along(axis_name, reverse=reverse)
    entering = jnp.where(position == 0, first, 0)
    links = shift_pairs(axis_size(axis_name), 1, reverse=reverse)
    nothing = jax.tree.map(lambda x: zeros_varying(x.shape, x.dtype, like=entering), jax.eval_shape(work, entering))
    results = nothing[0]
    for place in range(axis_size(axis_name)):
        results, leaving = jax.lax.cond(
            position == place, lambda state, _: work(state), lambda _, done: (done, nothing[1]), entering, results
        )
        if place < len(links):
            entering += jax.lax.ppermute(leaving, axis_name, links[place : place + 1])
    return results, entering
