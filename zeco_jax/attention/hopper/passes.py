"""How the pairs of tokens of a chunk that decays strongly are gone through: in passes whose factors stay in range."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import levels, tile
from zeco_jax.attention.hopper.tile import CHUNK, FACTORED_LIMIT, WEAKEST_GATE, Ref

# The pass over pairs within documents, beyond the levels of the tree.
_WITHIN_DOCUMENTS = levels.LEVELS


class Passes(NamedTuple):
    """The passes over a chunk, for the channels of one warpgroup.

    Gates that let nothing of any channel through cut the chunk into documents. If nothing else in it is strong, one
    pass goes over the pairs of each document, whose decays are products of a factor of either sign of the gates' sums.
    Otherwise there is one pass for each level of the tree of `levels.py`, and the cuts are gates like any other.

    Attributes:
        first: pass.
        end: the last one and one.
        numbers: shared memory [CHUNK] float32, the number of each token's document, negative where its gate is a cut,
            which counts for no pair of tokens.
    """

    first: jax.Array
    end: jax.Array
    numbers: Ref

    @classmethod
    def of(cls, gates: Ref, numbers: Ref, *, staging: Ref | None) -> "Passes":
        """Looks for documents.

        Args:
            gates: shared memory [2, CHUNK, HALF] bfloat16, from `tile.write_split`.
            numbers: shared memory [CHUNK] float32, to keep.
            staging: see `tile.products`.
        """
        cuts = (jnp.max(tile.load(gates.at[0]), axis=1) <= WEAKEST_GATE).astype(jnp.float32)
        tile.write(numbers, cuts)
        rows, columns = (_Side.of(numbers, axis) for axis in range(2))
        so_far = jnp.where(
            columns.spread(columns.tokens) <= rows.spread(rows.tokens), columns.spread(columns.numbers), 0
        )
        number = jnp.sum(so_far.astype(jnp.float32), axis=1) * (1.0 - 2.0 * cuts)
        # Every warp has read before others write.
        plgpu.commit_smem()
        tile.write(numbers, number)
        found = cls(_WITHIN_DOCUMENTS, _WITHIN_DOCUMENTS, numbers)
        weights = tile.ones_where(found.reached(jnp.int32(_WITHIN_DOCUMENTS)))
        sums = tile.summed(weights, gates, staging=staging)
        # A detour, to compare all of them with the limit.
        plgpu.commit_smem()
        tile.write(numbers, jnp.min(sums, axis=1))
        by_documents = tile.least(numbers, numbers) >= FACTORED_LIMIT
        plgpu.commit_smem()
        tile.write(numbers, number)
        first = jnp.where(by_documents, _WITHIN_DOCUMENTS, 0)
        return cls(first, jnp.where(by_documents, _WITHIN_DOCUMENTS + 1, levels.LEVELS), numbers)

    def parted(self, which: jax.Array, *, flipped: bool = False) -> jax.Array:
        """The pairs of tokens of a pass, [CHUNK, CHUNK]; `flipped` puts the earlier token first."""
        later, earlier = self._sides(flipped)
        of_later = _pick(which, levels.later(later.tokens, which), abs(later.numbers))
        of_earlier = _pick(which, levels.earlier(earlier.tokens, which), abs(earlier.numbers))
        in_order = earlier.spread(earlier.tokens) <= later.spread(later.tokens)
        return in_order & (later.spread(of_later) == earlier.spread(of_earlier))

    def reached(self, which: jax.Array, *, flipped: bool = False) -> jax.Array:
        """Whether a gate counts for a token in a pass, tokens by gates; `flipped` is gates by tokens."""
        tokens, gates = self._sides(flipped)
        half, later = levels.reach(tokens.tokens, which)
        of_tokens = _pick(which, half, abs(tokens.numbers))
        of_gates = _pick(which, levels.half(gates.tokens, which), gates.numbers)
        # As -1 turns x into -x - 1, one comparison tells the gates up to a token and those after it.
        distance = tokens.spread(tokens.tokens) - gates.spread(gates.tokens)
        counts = (distance ^ tokens.spread(_pick(which, later, 0))) >= 0
        return counts & (tokens.spread(of_tokens) == gates.spread(of_gates))

    def sign(self, which: jax.Array) -> jax.Array:
        """Of a token's sum of gates where it is the earlier one of a pair."""
        return jnp.where(which == _WITHIN_DOCUMENTS, -1.0, 1.0)

    def decays(self, which: jax.Array, gates: Ref, *, staging: Ref | None) -> tuple[jax.Array, jax.Array]:
        """The factors of tokens as later and as earlier ones of pairs, [CHUNK, HALF]."""
        sums = tile.summed(tile.ones_where(self.reached(which)), gates, staging=staging)
        return jnp.exp(sums), jnp.exp(sums * self.sign(which))

    def _sides(self, flipped: bool) -> list["_Side"]:
        """Tokens along the rows and along the columns of a matrix, or the other way round."""
        sides = [_Side.of(self.numbers, axis) for axis in range(2)]
        return sides[::-1] if flipped else sides


class _Side(NamedTuple):
    """Tokens along an axis of a matrix: their places in the chunk and their numbers, [CHUNK] int32."""

    tokens: jax.Array
    numbers: jax.Array
    axis: int

    @classmethod
    def of(cls, numbers: Ref, axis: int) -> "_Side":
        layout = (tile.ROW, tile.COLUMN)[axis]
        # Not optimized: the layout inference finds no way to read the same memory as rows and columns otherwise.
        number = plgpu.load(numbers, layout=layout, optimized=False).astype(jnp.int32)
        return cls(plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=layout), number, axis)

    def spread(self, x: jax.Array) -> jax.Array:
        """A number for each token along the other axis, too."""
        return (tile.along_rows, tile.along_columns)[self.axis](x, CHUNK)


def _pick(which: jax.Array, of_tree: jax.Array, of_documents: jax.Array | int) -> jax.Array:
    """Of a pass over documents, or of a level of the tree."""
    return levels.pick((which == _WITHIN_DOCUMENTS).astype(jnp.int32), of_documents, of_tree)
