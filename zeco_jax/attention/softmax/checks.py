"""What softmax attention accepts: every user mistake ends here, in one error that names the argument."""

import numbers

import jax
import jax.numpy as jnp


def check_softmax_inputs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None,
    segment_ids: jax.Array | None,
) -> None:
    """Checks ranks, shapes, dtypes and options of one call of causal attention.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a shape that doesn't fit the others.
    """
    for name, array, expected in (("q", q, "[B, T, H, K]"), ("k", k, "[B, T, G, K]"), ("v", v, "[B, T, G, V]")):
        _check_array(name, array, jnp.floating)
        if array.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions {expected}, got shape {array.shape}")
        if 0 in array.shape:
            raise ValueError(f"{name} must have no empty dimension, got shape {array.shape}")
    batch, tokens, heads, key_width = q.shape
    if (k.shape[:2], k.shape[3]) != ((batch, tokens), key_width):
        raise ValueError(f"k must be [B, T, G, K] with B, T, K = {(batch, tokens, key_width)}, got shape {k.shape}")
    if heads % k.shape[2]:
        raise ValueError(f"k must have a number of heads G that divides q's H = {heads}, got {k.shape[2]}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be [B, T, G, V] with k's B, T, G = {k.shape[:3]}, got shape {v.shape}")
    if segment_ids is not None:
        _check_array("segment_ids", segment_ids, jnp.integer)
        if segment_ids.shape != (batch, tokens):
            raise ValueError(f"segment_ids must be [B, T] = {(batch, tokens)}, got shape {segment_ids.shape}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, numbers.Real)):
        raise TypeError(f"scale must be a Python number or None, got {scale!r}")


def _check_array(name: str, array: jax.Array, kind: type) -> None:
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    if not jnp.issubdtype(array.dtype, kind):
        expected = "floating point" if kind is jnp.floating else "integers"
        raise TypeError(f"{name} must be {expected}, got {array.dtype}")
