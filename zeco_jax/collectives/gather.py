"""One all-gather of all ranks' maps, then a local scan: LASP-2's exchange, with decay (arXiv 2502.07563)."""

import jax
import jax.numpy as jnp

from zeco_jax.collectives.axis import AxisName, axis_size
from zeco_jax.collectives.maps import UNROLL, AffineMap, position_along


def gather_scan(own: AffineMap, axis_name: AxisName, *, reverse: bool) -> jax.Array:
    """The state that enters this rank when zero enters the first: `sum_j<p (prod_j<i<p decay_i) state_j`.

    Args:
        own: this rank's map.
        axis_name: mesh axis or tuple of axes.
        reverse: scan from the last rank to the first.

    Returns:
        [R, V]. Each rank receives P - 1 maps.
    """
    position = position_along(axis_name, reverse=reverse)
    everyone = AffineMap.unpack(jax.lax.all_gather(own.pack(), axis_name), own.decay.size)
    places = jnp.arange(axis_size(axis_name))

    def visit(entering: jax.Array, rank: tuple[jax.Array, AffineMap]) -> tuple[jax.Array, None]:
        place, earlier = rank
        return jnp.where(place < position, earlier(entering), entering), None

    ranks = (places[::-1] if reverse else places, everyone)
    return jax.lax.scan(visit, jnp.zeros_like(own.state), ranks, reverse=reverse, unroll=UNROLL)[0]
