"""Decays between the tokens of a chunk, where there is one per token and head."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.tile import CHUNK, Ref

# An exponent whose power is 0.
_NOTHING = -1e30


def sums_of(sums: Ref, batch: jax.Array, head: jax.Array, tokens: slice) -> Ref:
    """The part of the sums [B or 1, H, T] that belongs to some tokens."""
    return sums.at[batch if sums.shape[0] > 1 else 0, head, tokens]


def fetch_sums(
    sums: Ref, batch: jax.Array, head: jax.Array, tokens: slice, target: Ref, barrier: Ref, *, paired: bool
) -> None:
    """Fetches the sums of some tokens, for each head of a tile (`tile.heads_of`) one row of `target`."""
    for index, of_sums in enumerate(tile.heads_of(head, paired=paired)):
        plgpu.copy_gmem_to_smem(sums_of(sums, batch, of_sums, tokens), target.at[index], barrier)


@dataclass(frozen=True)
class Decays:
    """The decays of a chunk.

    Attributes:
        sums: shared memory [CHUNK] float32, the gates' sums up to and including every token.
        positions: shared memory [CHUNK] float32, see `write_positions`; `between` alone needs it.
    """

    sums: Ref
    positions: Ref | None = None

    def before(self) -> jax.Array:
        """From the start of the chunk to each token."""
        return jnp.exp(self._rows())

    def after(self) -> jax.Array:
        """From each token to the end of the chunk."""
        return jnp.exp(self._last() - self._rows())

    def whole(self) -> jax.Array:
        """From the start of the chunk to its end."""
        return jnp.exp(self._last())

    def between(self, *, transposed: bool = False) -> jax.Array:
        """From each token (column) to those after it and itself (row), 0 to those before it.

        Args:
            transposed: exchange rows and columns.
        """
        rows = tile.along_rows(self._rows() * tile.LOG2_E, CHUNK)
        columns = tile.along_columns(self._columns() * tile.LOG2_E, CHUNK)
        row, column = tokens_at(self.positions)
        exponents, shown = (columns - rows, row <= column) if transposed else (rows - columns, column <= row)
        # Hidden before the exponential, which could overflow there.
        return jnp.exp2(jnp.where(shown, exponents, _NOTHING))

    def _rows(self) -> jax.Array:
        return plgpu.load(self.sums, layout=tile.ROW)

    def _columns(self) -> jax.Array:
        return _load_columns(self.sums)

    def _last(self) -> jax.Array:
        return self.sums[CHUNK - 1]


def write_positions(positions: Ref) -> None:
    """Writes where in its chunk each token is, for `tokens_at` to read."""
    positions[...] = jnp.max(tile.indices()[0].astype(jnp.float32), axis=1)


def tokens_at(positions: Ref) -> tuple[jax.Array, jax.Array]:
    """The token of each row and of each column of a chunk's scores.

    Read from memory where they are needed: indices known to the compiler it would keep in registers through the loop.
    """
    return (
        tile.along_rows(plgpu.load(positions, layout=tile.ROW), CHUNK),
        tile.along_columns(_load_columns(positions), CHUNK),
    )


def _load_columns(vector: Ref) -> jax.Array:
    # Not optimized: the layout inference finds no way to read the same memory as rows and columns otherwise.
    return plgpu.load(vector, layout=tile.COLUMN, optimized=False)
