"""The four kinds of `log_decay`, and document borders, as one array of gates."""

import jax
import jax.numpy as jnp

# Its exponential is exactly 0 in float32 and float64, and sums of many stay finite where -inf would give NaN.
LOG_ZERO = -1e4


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Gates, sums and states are float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def document_starts(segment_ids: jax.Array, id_before: jax.Array) -> jax.Array:
    """Marks the tokens whose segment id differs from that of the token before.

    Args:
        segment_ids: [B, T] integers.
        id_before: [B, 1], the id of the token before the first one; the first one's own id if nothing precedes it.

    Returns:
        [B, T] booleans.
    """
    return segment_ids != jnp.concatenate([id_before, segment_ids[:, :-1]], axis=1)


def normalize_gates(
    log_decay: jax.Array, starts: jax.Array | None, shape: tuple[int, ...], dtype: jnp.dtype, *, finite: bool = True
) -> jax.Array:
    """Brings every kind of `log_decay` to [B or 1, T, H, K or 1], finite, with the state cut at document starts.

    A gate of -inf becomes `LOG_ZERO`, which decays to the same 0; its gradient is 0, as it is for the recurrence.

    Args:
        log_decay: [H], [B, T, H] or [B, T, H, K].
        starts: None or [B, T] booleans, tokens that must not see any state from before them.
        shape: q's shape [B, T, H, K].
        dtype: the accumulation dtype.
        finite: clamp the gates; a pass over them that a kernel may save.

    Returns:
        Gates of one of four shapes: a leading 1 where all sequences share them, a last 1 where all key channels do.
    """
    _, tokens, heads, _ = shape
    if log_decay.ndim == 1:
        gates = jnp.broadcast_to(log_decay.astype(dtype)[None, None, :, None], (1, tokens, heads, 1))
    elif log_decay.ndim == 3:
        gates = log_decay.astype(dtype)[..., None]
    else:
        gates = log_decay.astype(dtype)
    if finite:
        # Written so that NaN stays NaN.
        gates = jnp.where(gates < LOG_ZERO, LOG_ZERO, gates)
    return gates if starts is None else jnp.where(starts[:, :, None, None], LOG_ZERO, gates)
