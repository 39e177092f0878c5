"""What `linear_attention` accepts: every user mistake ends here, in one error that names the argument."""

import numbers

import jax
import jax.numpy as jnp


def check_inputs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    *,
    scale: float | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> None:
    """Checks ranks, shapes, dtypes and options of one call.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape that doesn't fit the others, or an option out of range.
    """
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "initial_state": initial_state}
    for name, array in arrays.items():
        if array is not None or name in "qkv":
            _check_floating(name, array)
    for name, expected in (("q", "[B, T, H, K]"), ("k", "[B, T, H, K]"), ("v", "[B, T, H, V]")):
        if arrays[name].ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions {expected}, got shape {arrays[name].shape}")
    batch, tokens, heads, key_width = q.shape
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q and v must have no empty dimension, got shapes {q.shape} and {v.shape}")
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {q.shape}, got {k.shape}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with q's B, T, H = {q.shape[:3]}, got shape {v.shape}")
    kinds = ((heads,), (batch, tokens, heads), (batch, tokens, heads, key_width))
    if log_decay is not None and log_decay.shape not in kinds:
        raise ValueError(
            f"log_decay must be None or have shape [H] = {kinds[0]}, [B, T, H] = {kinds[1]} or "
            f"[B, T, H, K] = {kinds[2]}, got {log_decay.shape}"
        )
    state_shape = (batch, heads, key_width, v.shape[-1])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state must be [B, H, K, V] = {state_shape}, got shape {initial_state.shape}")
    if segment_ids is not None:
        _check_array("segment_ids", segment_ids)
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids must be integers, got {segment_ids.dtype}")
        if segment_ids.shape != (batch, tokens):
            raise ValueError(f"segment_ids must be [B, T] = {(batch, tokens)}, got shape {segment_ids.shape}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, numbers.Real)):
        raise TypeError(f"scale must be a Python number or None, got {scale!r}")
    if chunk_size is not None:
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, numbers.Integral):
            raise TypeError(f"chunk_size must be an integer or None, got {chunk_size!r}")
        if chunk_size < 1 or chunk_size & (chunk_size - 1):
            raise ValueError(f"chunk_size must be a power of two, got {chunk_size}")


def _check_array(name: str, array: jax.Array) -> None:
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")


def _check_floating(name: str, array: jax.Array) -> None:
    _check_array(name, array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {array.dtype}")
