"""All-Scan: the state that enters each rank, from what every rank adds and how much it decays."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from zeco_jax.collectives.axis import (
    Axis,
    AxisName,
    AxisPart,
    axis_index,
    axis_names,
    axis_size,
    axis_tuple,
    split_axis,
)
from zeco_jax.collectives.chain import chain_of_rows
from zeco_jax.collectives.cost import (
    Choice,
    Payload,
    chain_blocks,
    choose,
    choose_hierarchical,
    levels_of,
)
from zeco_jax.collectives.doubling import doubling_scan
from zeco_jax.collectives.gather import gather_scan
from zeco_jax.collectives.hierarchical import hierarchical_scan
from zeco_jax.collectives.links import network_in_scope
from zeco_jax.collectives.maps import AffineMap, position_along
from zeco_jax.collectives.remote_dma import remote_dma_scan
from zeco_jax.collectives.transpose import transpose_scan
from zeco_jax.varying import cast_varying, match_varying

SCHEDULES = ("auto", "chain", "doubling", "gather", "transpose", "serial", "hierarchical", "remote_dma")


@dataclass(frozen=True)
class AllScanOptions:
    """The static part of an All-Scan: where it runs and how; see `all_scan`."""

    axis_name: AxisName
    schedule: str = "auto"
    blocks: int | None = None
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}: expected one of {', '.join(map(repr, SCHEDULES))}")
        if self.blocks is not None and (isinstance(self.blocks, bool) or not isinstance(self.blocks, int)):
            raise TypeError(f"blocks must be an integer or None, got {self.blocks!r}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")

    def backwards(self) -> "AllScanOptions":
        """The same exchange in the opposite direction, as the gradient needs it."""
        return AllScanOptions(self.axis_name, self.schedule, self.blocks, not self.reverse)


def all_scan(
    state: jax.Array,
    decay: jax.Array,
    axis_name: AxisName,
    *,
    schedule: str = "auto",
    blocks: int | None = None,
    reverse: bool = False,
    initial_state: jax.Array | None = None,
) -> jax.Array:
    r"""The state that enters each rank: an exclusive scan of the ranks' affine maps.

    .. math:: E_0 = \text{initial}, \qquad E_{p+1} = \text{decay}_p \odot E_p + \text{state}_p

    and with `reverse` from the last rank to the first: :math:`E_{p-1} = \text{decay}_p \odot E_p + \text{state}_p`.
    Call it inside `jax.shard_map`. The gradient is one All-Scan in the opposite direction.

    Args:
        state: [..., K, V] floating point, what this rank's stretch adds.
        decay: [..., K] (per key channel) or [...] (per head), in [0, 1], linear (not a logarithm).
        axis_name: mesh axis along which the ranks are ordered, or a tuple of axes, slowest first.
        schedule: "chain" passes the state from rank to rank in blocks, one state on each link (ZeCO); "doubling" is a
            scan in logarithmically many rounds; "gather" one all-gather of everybody's summary (LASP-2); "transpose"
            two all-to-alls with a local scan between them; "serial" the chain in one block (LASP-1); "hierarchical"
            takes the axes of a tuple, or small groups of a single axis of TPUs, level by level;
            "remote_dma" is the chain as one Pallas kernel for TPUs, which the compiler has seen but no TPU has run;
            "auto" chooses among the others by the cost model, see `zeco_jax.collectives.cost`.
        blocks: number of pipeline blocks of the chain, which "auto" then takes; None chooses from hop latency and
            bandwidth.
        reverse: scan from the last rank to the first.
        initial_state: [..., K, V], what enters the first rank; None stands for zero. Only that rank's value counts.

    Returns:
        [..., K, V], the entering state of this rank, in `state`'s dtype.

    Raises:
        ValueError: shapes that don't match, an unknown schedule, blocks < 1, an axis that isn't in scope.
        TypeError: arrays that aren't floating point.

    Reference: ZeCO, arXiv 2507.01004, section 3 (All-Scan).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> import zeco_jax
        >>> mesh = jax.make_mesh((4,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:4])
        >>> scan = jax.shard_map(lambda s, d: zeco_jax.all_scan(s[0], d[0], "seq")[None], mesh=mesh,
        ...                      in_specs=P("seq"), out_specs=P("seq"))
        >>> scan(jnp.ones((4, 1, 1)), jnp.full((4, 1), 0.5)).ravel().tolist()
        [0.0, 1.0, 1.5, 1.75]
    """
    options = AllScanOptions(axis_name, schedule, blocks, reverse)
    axis_size(axis_name)
    _check(state, decay, initial_state)
    if initial_state is None:
        initial_state = jnp.zeros_like(state)
    if decay.ndim == state.ndim - 2:
        decay = jnp.broadcast_to(decay[..., None], state.shape[:-1])
    # The gradient rule must see one set of varying axes; what was replicated gets its cotangents summed here.
    state = cast_varying(state, axis_names(axis_name))
    state, decay, initial_state = match_varying([state, decay.astype(state.dtype), initial_state.astype(state.dtype)])
    return _all_scan(state, decay, initial_state, options)


def _check(state: jax.Array, decay: jax.Array, initial_state: jax.Array | None) -> None:
    for name, array in (("state", state), ("decay", decay), ("initial_state", initial_state)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {array.dtype}")
    if state.ndim < 2:
        raise ValueError(f"state must be [..., K, V], got shape {state.shape}")
    if decay.shape not in (state.shape[:-1], state.shape[:-2]):
        raise ValueError(
            f"decay must have shape {state.shape[:-1]} (per key channel) or {state.shape[:-2]} (per head) for a state "
            f"of shape {state.shape}, got {decay.shape}"
        )
    if initial_state is not None and initial_state.shape != state.shape:
        raise ValueError(f"initial_state must have state's shape {state.shape}, got {initial_state.shape}")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _all_scan(state: jax.Array, decay: jax.Array, initial: jax.Array, options: AllScanOptions) -> jax.Array:
    rows = (-1, state.shape[-1])
    own = AffineMap(decay.reshape(-1), state.reshape(rows))
    return _scan_rows(own, initial.reshape(rows), options).reshape(state.shape)


def _scan_rows(own: AffineMap, initial: jax.Array, options: AllScanOptions) -> jax.Array:
    """Runs the schedule on rows [R] and [R, V]."""
    axis_name, reverse = options.axis_name, options.reverse
    choice = _choose(own, options)
    first = position_along(axis_name, reverse=reverse) == 0
    if axis_size(axis_name) == 1:
        return jnp.where(first, initial, 0)
    if choice.schedule == "chain":
        return chain_of_rows(own, initial, axis_name, blocks=choice.blocks, reverse=reverse)
    if choice.schedule == "remote_dma":
        return remote_dma_scan(own, initial, axis_name, blocks=choice.blocks, reverse=reverse)
    # The first rank's map takes the initial state in, so that nobody else needs it.
    own = AffineMap(own.decay, jnp.where(first, own(initial), own.state))

    def scan(schedule: str, own: AffineMap, axis_name: Axis) -> jax.Array:
        if schedule == "chain":
            zero = jnp.zeros_like(own.state)
            return chain_of_rows(own, zero, axis_name, blocks=choice.blocks, reverse=reverse)
        scans = {"doubling": doubling_scan, "gather": gather_scan, "transpose": transpose_scan}
        return scans[schedule](own, axis_name, reverse=reverse)

    if choice.schedule == "hierarchical":
        entering = hierarchical_scan(own, _levels(axis_name), partial(scan, choice.slowest), reverse=reverse)
    else:
        entering = scan(choice.schedule, own, axis_name)
    return jnp.where(first, initial, entering)


def _levels(axis_name: AxisName) -> tuple[str | AxisPart, ...]:
    """What a hierarchical scan takes one after the other: the mesh axes, or parts of a single one, slowest first."""
    axes = axis_tuple(axis_name)
    sizes = levels_of(axis_size(axes[0]), network_in_scope().inside)
    return split_axis(axes[0], sizes) if len(axes) == 1 and len(sizes) > 1 else axes


def _choose(own: AffineMap, options: AllScanOptions) -> Choice:
    """Schedule and blocks, where the options leave them open."""
    sizes = [axis_size(axis) for axis in _levels(options.axis_name)]
    payload = Payload(*own.state.shape, own.state.dtype.itemsize)
    network = network_in_scope()
    if options.schedule == "serial":
        return Choice("chain", 1, "chain")
    if options.schedule == "auto" and options.blocks is not None:
        return Choice("chain", options.blocks, "chain")
    if options.schedule == "auto":
        choice = choose(payload, sizes, network)
    elif options.schedule == "hierarchical":
        choice = choose_hierarchical(payload, sizes, network)
    else:
        blocks = chain_blocks(payload, math.prod(sizes), network.links([math.prod(sizes)])[0])
        choice = Choice(options.schedule, blocks, options.schedule)
    return choice if options.blocks is None else choice._replace(blocks=options.blocks)


def _forward(
    state: jax.Array, decay: jax.Array, initial: jax.Array, options: AllScanOptions
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    entering = _all_scan(state, decay, initial, options)
    return entering, (decay, entering)


def _backward(
    options: AllScanOptions, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    decay, entering = residuals
    # The adjoint of the state that leaves a rank obeys the same recurrence, from the other end.
    leaving = _all_scan(cotangent, decay, jnp.zeros_like(cotangent), options.backwards())
    ranks, rank = axis_size(options.axis_name), axis_index(options.axis_name)
    first = rank == (ranks - 1 if options.reverse else 0)
    into_first = jnp.where(first, cotangent + decay[..., None] * leaving, 0)
    return leaving, jnp.sum(leaving * entering, axis=-1), into_first


_all_scan.defvjp(_forward, _backward)
