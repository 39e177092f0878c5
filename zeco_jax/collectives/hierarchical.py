"""Scans over several mesh axes, or the parts of one, level by level.

Rows are shared out inside, scanned across, and brought back.
"""

from collections.abc import Callable

import jax

from zeco_jax.collectives.axis import AxisPart
from zeco_jax.collectives.maps import AffineMap
from zeco_jax.collectives.transpose import collect_rows, compose_shares, scan_shares, spread_rows


def hierarchical_scan(
    own: AffineMap,
    axes: tuple[str | AxisPart, ...],
    scan_slowest: Callable[[AffineMap, str | AxisPart], jax.Array],
    *,
    reverse: bool,
) -> jax.Array:
    """The state that enters this rank when zero enters the first, ranks counted with the last axis fastest.

    Along the fastest axis an all-to-all gives each rank a share of the rows of all maps of its group. The group's map,
    on that share alone, is scanned along the slower axes: every link between groups carries a part of it. Then each
    rank scans its group's maps from the state that enters the group, and a second all-to-all brings every rank its
    rows. With n ranks in a group, 1 / n of a state crosses each slow link in each round.

    Args:
        own: this rank's map.
        axes: mesh axes or parts of one, slowest first.
        scan_slowest: `(map, axis) -> entering state`, the schedule of the slowest axis.
        reverse: scan from the last rank to the first.

    Returns:
        [R, V].
    """
    *slower, fastest = axes
    if not slower:
        return scan_slowest(own, fastest)
    shares = spread_rows(own, fastest)
    group = compose_shares(shares, reverse=reverse)
    entering_group = hierarchical_scan(group, tuple(slower), scan_slowest, reverse=reverse)
    entering = scan_shares(shares, entering_group, reverse=reverse)
    return collect_rows(entering, own.state.shape[0], fastest)
