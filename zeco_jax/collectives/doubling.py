"""Log-depth exclusive scan of affine maps: every round, each rank hears of about twice as many ranks before it."""

import jax
import jax.numpy as jnp

from zeco_jax.collectives.axis import Axis, axis_size, permute
from zeco_jax.collectives.maps import AffineMap, position_along, shift_pairs


def doubling_distances(ranks: int) -> list[int]:
    """How far each round sends: 1, 2, 3, 6, 12, ... until every rank has heard of all ranks before it.

    After these rounds a rank knows 1, 3, 6, 12, ... ranks before it. That is never more rounds, and for many P one
    less, than a shift by one followed by doubling: `2 + ceil(log2((P - 1) / 3))` for P > 2 (J. L. Träff's
    "123-doubling" for exclusive scans).

    Example:
        >>> from zeco_jax.collectives.doubling import doubling_distances
        >>> doubling_distances(8), len(doubling_distances(256))
        ([1, 2, 3, 6], 9)
    """
    distances, known = [], 0
    for distance in (1, 2):
        if known < ranks - 1:
            distances.append(distance)
            known += distance
    while known < ranks - 1:
        distances.append(known)
        known *= 2
    return distances


def doubling_scan(own: AffineMap, axis_name: Axis, *, reverse: bool) -> jax.Array:
    """The state that enters this rank when zero enters the first.

    Args:
        own: this rank's map.
        axis_name: mesh axis, tuple of axes or part of an axis.
        reverse: compose from the last rank to the first.

    Returns:
        [R, V].
    """
    ranks = axis_size(axis_name)
    position = position_along(axis_name, reverse=reverse)
    distances = doubling_distances(ranks)
    before = own.identity()
    for round_number, distance in enumerate(distances):
        # The second round sends what is before this rank and the rank itself; only so it reaches a distance of 2.
        known = own if round_number == 0 else before.then(own) if round_number == 1 else before
        pairs = shift_pairs(ranks, distance, reverse=reverse)
        if round_number == len(distances) - 1:
            # Nothing is composed any more: the decays stay at home.
            return before(permute(known.state, axis_name, pairs))
        heard = AffineMap.unpack(permute(known.pack(), axis_name, pairs), own.decay.size)
        # A rank without a source has nothing further before it: the identity. The state is 0 already.
        before = AffineMap(jnp.where(position >= distance, heard.decay, 1), heard.state).then(before)
    return before.state
