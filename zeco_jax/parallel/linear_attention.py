"""The public operator: linear attention on one device, or inside `jax.shard_map` over a sequence axis."""

import jax
import jax.numpy as jnp

from zeco_jax.attention import Call, attend, check_inputs, document_starts, make_backend
from zeco_jax.collectives import AllScanOptions, AxisName, axis_index, axis_names, axis_size, halo
from zeco_jax.parallel.exchange import AllScanExchange
from zeco_jax.parallel.ulysses import ulysses_attention
from zeco_jax.varying import cast_varying


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    axis_name: AxisName | None = None,
    schedule: str = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Causal linear attention with decay; with `axis_name`, over a sequence that is cut over the ranks (ZeCO).

    .. math:: S_t = e^{g_t} \odot S_{t-1} + k_t v_t^\top, \qquad o_t = \text{scale} \cdot q_t S_t

    The gate is inclusive: token t's gate decays the old state, then its own key and value are added undecayed. With
    `axis_name` every rank passes its shard [B, T, H, *] of the sequence, in rank order; the result is that of the whole
    sequence. One All-Scan of the ranks' states forward, one reverse All-Scan backward. Differentiable in every
    floating-point argument, also through `final_state`.

    Args:
        q: [B, T, H, K] floating point.
        k: [B, T, H, K].
        v: [B, T, H, V].
        log_decay: natural logarithm of the decay, <= 0, -inf allowed: None (no decay), [H] (retention, lightning
            attention), [B, T, H] (Mamba-2, simple GLA) or [B, T, H, K] (GLA).
        scale: factor on the outputs, `K ** -0.5` if None.
        initial_state: [B, H, K, V], the state before the first token of the first rank; None stands for zero.
        segment_ids: [B, T] integers, packed documents: no state crosses a change of id, on whichever rank it falls. The
            first token continues the document that `initial_state` comes from.
        axis_name: inside `jax.shard_map`: the mesh axis along which T is cut, or a tuple of axes, slowest first.
        schedule: how the states travel, "chain" or "auto"; see `all_scan`. "ulysses" shares out the heads, no
            states travel, see `ulysses_attention`. Without `axis_name` it has no effect.
        backend: "tpu", "hopper" (kernels for H100 and H200), "xla" (chunkwise), "reference" (token by token), or None
            for the best one that can serve; why another can't is logged at level INFO.
        chunk_size: tokens per chunk, a power of two; None for the backend's choice.

    Returns:
        out: [B, T, H, V] in v's dtype.
        final_state: [B, H, K, V] float32 (float64 for float64 inputs), the state after the last token of the last rank,
            the same on every rank.

    Raises:
        ValueError: shapes that don't match, an unknown backend or schedule, an axis that isn't in scope.
        TypeError: arguments of the wrong type, integer inputs among them.
        NotImplementedError: the backend that was asked for can't serve the call; the message says why.

    References:
        ZeCO, arXiv 2507.01004, section 3; gated linear attention, arXiv 2312.06635, section 4.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import zeco_jax
        >>> q = k = v = jnp.ones((1, 4, 1, 1))
        >>> out, final_state = zeco_jax.linear_attention(q, k, v, jnp.log(jnp.array([0.5])))
        >>> out.ravel().tolist(), final_state.item()
        ([1.0, 1.5, 1.75, 1.875], 1.875)
    """
    check_inputs(
        q, k, v, log_decay, scale=scale, initial_state=initial_state, segment_ids=segment_ids, chunk_size=chunk_size
    )
    if schedule == "ulysses":
        if axis_name is not None:
            return ulysses_attention(
                q,
                k,
                v,
                log_decay,
                axis_name=axis_name,
                scale=scale,
                initial_state=initial_state,
                segment_ids=segment_ids,
                backend=backend,
                chunk_size=chunk_size,
            )
        schedule = "auto"
    starts = None if segment_ids is None else _document_starts(segment_ids, axis_name)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    local = make_backend(backend, Call.of(q, k, v), scale=scale, chunk_size=chunk_size)
    options = AllScanOptions(axis_name, schedule)
    if axis_name is None or axis_size(axis_name) == 1:
        out, state_out = attend(q, k, v, log_decay, backend=local, initial_state=initial_state, starts=starts)
        # A sum over an axis of one rank changes the type alone: the state is the same on every rank.
        return out, state_out if axis_name is None else jax.lax.psum(state_out, axis_name)
    # Even what is the same on every rank stands for another part of the sequence on each.
    q = cast_varying(q, axis_names(axis_name))
    exchange = AllScanExchange(options)
    out, state_out = attend(
        q, k, v, log_decay, backend=local, exchange=exchange, initial_state=initial_state, starts=starts
    )
    last = axis_index(axis_name) == axis_size(axis_name) - 1
    return out, jax.lax.psum(jnp.where(last, state_out, 0), axis_name)


def _document_starts(segment_ids: jax.Array, axis_name: AxisName | None) -> jax.Array:
    own_first = segment_ids[:, :1]
    if axis_name is None:
        return document_starts(segment_ids, own_first)
    before = halo(segment_ids, 1, axis_name)
    # Nothing precedes the first rank.
    return document_starts(segment_ids, jnp.where(axis_index(axis_name) == 0, own_first, before))
