"""Scores between the tokens of one chunk, decayed, at any strength of decay."""

import jax
import jax.numpy as jnp

from zeco_jax.attention.xla.contract import contract
from zeco_jax.attention.xla.decay_tree import Level


def decayed_scores(q: jax.Array, k: jax.Array, levels: tuple[Level, ...], operand_dtype: jnp.dtype) -> jax.Array:
    r"""Lower-triangular :math:`A_{ij} = \sum_d q_{id} k_{jd} e^{b_{id} - b_{jd}}` for i >= j, 0 above.

    Args:
        q: [..., C, K] in the accumulation dtype.
        k: [..., C, K] likewise.
        levels: the chunk's decay tree; one gate for all key channels, or K of them.
        operand_dtype: what the matrix unit multiplies.

    Returns:
        [..., C, C].
    """
    if levels and levels[0].to_right.shape[-1] == 1:
        return contract("...id,...jd->...ij", q, k, operand_dtype) * _decay_matrix(levels, q.dtype)
    chunk = q.shape[-2]
    diagonal = jnp.sum(q * k, axis=-1)[..., None, None]
    blocks = []
    for level in levels:
        size = level.to_right.shape[-2]
        pairs = (*q.shape[:-2], chunk // (2 * size), 2, size, q.shape[-1])
        q_right = q.reshape(pairs)[..., 1, :, :] * jnp.exp(level.to_right)
        k_left = k.reshape(pairs)[..., 0, :, :] * jnp.exp(level.from_left)
        blocks.append(contract("...id,...jd->...ij", q_right, k_left, operand_dtype))
    return _assemble(diagonal, blocks)


def _decay_matrix(levels: tuple[Level, ...], dtype: jnp.dtype) -> jax.Array:
    """[..., C, C]: exp(b_i - b_j) for i >= j, 0 above, from one gate per token."""
    first = levels[0].to_right
    ones = jnp.ones((*first.shape[:-3], 2 * first.shape[-3], 1, 1), dtype)
    return _assemble(ones, [jnp.exp(level.to_right + jnp.swapaxes(level.from_left, -1, -2)) for level in levels])


def _assemble(diagonal: jax.Array, blocks: list[jax.Array]) -> jax.Array:
    """Builds the lower triangle from its diagonal [..., C, 1, 1] and the blocks below it, smallest first."""
    triangle = diagonal
    for block in blocks:
        size = block.shape[-1]
        pairs = triangle.reshape(*triangle.shape[:-3], triangle.shape[-3] // 2, 2, size, size)
        upper, lower = pairs[..., 0, :, :], pairs[..., 1, :, :]
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        triangle = jnp.concatenate([top, jnp.concatenate([block, lower], axis=-1)], axis=-2)
    return triangle[..., 0, :, :]
