"""Rotary position embedding (RoPE)."""

import jax
import jax.numpy as jnp
import numpy as np


def rotary(x: jax.Array, positions: jax.Array, *, base: float = 10_000.0) -> jax.Array:
    r"""Turns pairs of features by angles that grow with the token's position.

    .. math:: (x_i, x_{i + K/2}) \mapsto R(\theta_i p) \, (x_i, x_{i + K/2}), \qquad \theta_i = \text{base}^{-2i/K}

    for token position p: products of two vectors that were turned so depend on the distance of their positions alone.
    Angles are counted in 2^-32 turns, whose integer products with positions wrap around and lose nothing: a token is as
    exactly placed after millions of others as at the beginning.

    Su et al., "RoFormer" (arXiv 2104.09864), section 3.2.

    Args:
        x: [B, T, H, K] floats, K even.
        positions: [T] int32.
        base: how much slower the last pair turns than the first, about.

    Returns:
        [B, T, H, K] in the dtype of `x`, computed in float32.

    Raises:
        ValueError: K is odd, or `base` isn't above 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from zeco_jax.layers import rotary
        >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
        >>> [f"{feature:.2f}" for feature in rotary(x, jnp.array([1])).ravel()]
        ['0.54', '0.84']
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"x must have an even number of features to turn in pairs, got shape {x.shape}")
    if not base > 1:
        raise ValueError(f"base must be above 1, got {base}")
    frequencies = base ** -np.linspace(0, 1, width // 2, endpoint=False)
    steps = np.round(frequencies / (2 * np.pi) * 2**32).astype(np.uint32)
    turns = (positions.astype(jnp.uint32)[:, None] * steps).view(jnp.int32)
    angles = turns[:, None].astype(jnp.float32) * np.float32(2 * np.pi / 2**32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)
