"""All-Scan: the state that enters each rank, from what every rank adds and how much it decays."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from zeco_jax.collectives.axis import AxisName, axis_index, axis_names, axis_size
from zeco_jax.collectives.chain import chain_scan
from zeco_jax.varying import cast_varying, match_varying

SCHEDULES = ("auto", "chain")


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
        schedule: "chain" passes the state from rank to rank in blocks, one state on each link; "auto" chooses.
        blocks: number of pipeline blocks of the chain; None chooses from hop latency and bandwidth.
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
    entering = chain_scan(
        state.reshape(rows),
        decay.reshape(-1),
        initial.reshape(rows),
        options.axis_name,
        blocks=options.blocks,
        reverse=options.reverse,
    )
    return entering.reshape(state.shape)


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
