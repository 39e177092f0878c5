"""Scores of a chunk whose gates are too strong to be factored: one level of a binary tree at a time.

Tokens i > j of a chunk part at one level: j is in the left half of a block, i in its right half. At that level the
decay between them is the product of two factors that are at most 1, from j to the end of its half and from there to i.
So no exponent is positive, and none is a difference of two sums. The tokens themselves are a level of their own.
"""

import jax
import jax.numpy as jnp

from zeco_jax.attention.hopper import tile

# Halves of 1, 2, ... CHUNK / 2 tokens, and the diagonal.
LEVELS = tile.CHUNK.bit_length()
_DIAGONAL = LEVELS - 1


def parted(rows: jax.Array, columns: jax.Array, level: jax.Array) -> jax.Array:
    """Whether tokens i (row) and j (column) part at a level."""
    right, left = rows >> level, columns >> level
    # Zero where the halves are neighbours, the left one even.
    apart = ((right ^ left) - 1) | (left & 1)
    diagonal = (level == _DIAGONAL).astype(jnp.int32)
    return diagonal * (rows - columns) + (1 - diagonal) * apart == 0


def reached(rows: jax.Array, columns: jax.Array, level: jax.Array) -> jax.Array:
    """Whether the gate of a token (column) counts for another (row): between it and the middle of its block."""
    right, left = rows >> level, columns >> level
    after = jnp.where((right & 1) == 1, rows - columns, columns - rows - 1)
    # Negative numbers have their sign bit set: zero only within the half, on the side of its middle, off the diagonal.
    return ((right ^ left) | (after >> 31) | (level == _DIAGONAL).astype(jnp.int32)) == 0
