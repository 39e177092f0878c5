"""Sums of gates inside a chunk, built by doubling so that no exponent is ever a difference of large sums."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Level(NamedTuple):
    """Two neighbouring blocks of h tokens: exponents from a token on the left to one on the right, in two factors.

    Attributes:
        to_right: [..., C / 2h, h, G], the gates from the right block's first token to each of its tokens, inclusive.
        from_left: [..., C / 2h, h, G], the gates after each of the left block's tokens to that block's end.
    """

    to_right: jax.Array
    from_left: jax.Array


class DecayTree(NamedTuple):
    """The sums of a chunk's gates that the chunkwise form needs.

    Attributes:
        levels: blocks of 1, 2, 4, ... C / 2 tokens, paired.
        to_token: [..., C, G], from the chunk's first token to each token, inclusive.
        from_token: [..., C, G], after each token to the chunk's end.
        total: [..., G], the whole chunk.
    """

    levels: tuple[Level, ...]
    to_token: jax.Array
    from_token: jax.Array
    total: jax.Array


def decay_tree(gates: jax.Array) -> DecayTree:
    r"""Sums gates over every stretch that a binary tree over the chunk's tokens knows.

    With b the cumulative sum of gates, the decay from token j to token i is :math:`e^{b_i - b_j}`. The difference of
    two large sums loses digits, and its factors overflow or underflow when they are taken apart at the wrong place.
    Here i and j meet in exactly one pair of blocks, j in the left one and i in the right one, and the exponent is the
    sum of two numbers <= 0 that were only ever added up: both factors are at most 1 and accurate at any strength of
    decay.

    Args:
        gates: [..., C, G], natural logarithms, C a power of two.

    Returns:
        The sums.
    """
    *batch, chunk, width = gates.shape
    to_token = gates[..., None, :]
    from_token = jnp.zeros_like(to_token)
    total = gates
    levels = []
    size = 1
    while size < chunk:
        pairs = (*batch, chunk // (2 * size), 2)
        to_left, to_right = _halves(to_token.reshape(*pairs, size, width))
        from_left, from_right = _halves(from_token.reshape(*pairs, size, width))
        levels.append(Level(to_right, from_left))
        left, right = total.reshape(*pairs, width)[..., 0, :], total.reshape(*pairs, width)[..., 1, :]
        to_token = jnp.concatenate([to_left, to_right + left[..., None, :]], axis=-2)
        from_token = jnp.concatenate([from_left + right[..., None, :], from_right], axis=-2)
        total = left + right
        size *= 2
    return DecayTree(tuple(levels), to_token[..., 0, :, :], from_token[..., 0, :, :], total[..., 0, :])


def _halves(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    return blocks[..., 0, :, :], blocks[..., 1, :, :]
