"""Scores of a chunk whose gates are too strong to be factored: one level of a binary tree at a time.

Tokens i > j of a chunk part at one level: j is in the left half of a block, i in its right half. At that level the
decay between them is the product of two factors that are at most 1, from j to the end of its half and from there to i.
So no exponent is positive, and none is a difference of two sums. The tokens themselves are a level of their own.

Everything is said of tokens, not of pairs: there are 64 of the ones, 4096 of the others.
"""

import jax
import jax.numpy as jnp

from zeco_jax.attention.hopper import tile

# Halves of 1, 2, ... CHUNK / 2 tokens, and the diagonal.
LEVELS = tile.CHUNK.bit_length()
_DIAGONAL = LEVELS - 1


def pick(condition: jax.Array, x: jax.Array | int, y: jax.Array | int) -> jax.Array:
    """`x` where an integer is 1, `y` where it is 0."""
    return condition * x + (1 - condition) * y


def half(token: jax.Array, level: jax.Array) -> jax.Array:
    """The half that a token is in; the gates between it and the middle of its block are in the same."""
    return token >> level


def later(token: jax.Array, level: jax.Array) -> jax.Array:
    """What a token must have in common with the earlier one of a pair, see `earlier`."""
    own = half(token, level)
    return pick(_is_diagonal(level), token, pick(own & 1, own, -1))


def earlier(token: jax.Array, level: jax.Array) -> jax.Array:
    """A number for tokens: they part at a level from those after them whose `later` is the same."""
    return pick(_is_diagonal(level), token, half(token, level) + 1)


def reach(token: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which gates count for a token: its half, and 0 for those up to it or -1 for those after it."""
    own = half(token, level)
    # On the diagonal none.
    return pick(_is_diagonal(level), -1, own), (own & 1) - 1


def _is_diagonal(level: jax.Array) -> jax.Array:
    return (level == _DIAGONAL).astype(jnp.int32)
