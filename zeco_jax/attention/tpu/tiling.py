"""How one call is cut into the blocks that a step of a kernel works on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zeco_jax.attention.tpu.generations import Generation

LANES = 128
# Tokens of a packed tile of bfloat16: fewer would leave parts of every register empty.
SMALLEST_CHUNK = 16
# More tokens cost scores without saving anything, and their gates' sums would not be exact.
LARGEST_CHUNK = 256
DEFAULT_VMEM_LIMIT = 16 * 2**20
# Independent heads are what the scheduler fills waiting times with; see NOTES.md.
MOST_HEADS = 8


class Blocks(NamedTuple):
    """An array in HBM and the block of it that a step sees.

    Attributes:
        shape: of the array.
        block: None for an axis that the kernel doesn't see, with one entry per step.
        place: (batch, group of heads, chunk) -> the block's index.
    """

    shape: tuple[int, ...]
    block: tuple[int | None, ...]
    place: Callable[..., tuple]

    @property
    def elements(self) -> int:
        """Of one block."""
        return math.prod(size or 1 for size in self.block)


@dataclass(frozen=True)
class Tiling:
    """A call on whole tiles: tokens filled up to whole chunks, widths to whole lanes.

    Tokens of the filling have k = 0 and gate 0: they leave every state as it is.

    Attributes:
        batch: sequences.
        tokens: before filling up.
        heads: of all steps.
        key_width: before filling up.
        value_width: before filling up.
        chunk: tokens per step.
        heads_per_step: heads per step.
        channel: whether every key channel has a gate.
        dtype: of q, k and v, bfloat16 or float32.
    """

    batch: int
    tokens: int
    heads: int
    key_width: int
    value_width: int
    chunk: int
    heads_per_step: int
    channel: bool
    dtype: jnp.dtype

    @property
    def chunks(self) -> int:
        """Steps along the tokens."""
        return -(-self.tokens // self.chunk)

    @property
    def key_lanes(self) -> int:
        """Key width, filled up."""
        return -(-self.key_width // LANES) * LANES

    @property
    def value_lanes(self) -> int:
        """Value width, filled up."""
        return -(-self.value_width // LANES) * LANES

    @property
    def grid(self) -> tuple[int, int, int]:
        """Sequences, groups of heads, chunks."""
        return self.batch, self.heads // self.heads_per_step, self.chunks

    @property
    def vmem_bytes(self) -> int:
        """What the most demanding kernel, the adjoint of the replay, takes: blocks, two of each, and temporaries.

        An upper bound, from what the compiler was content with.
        """
        keys, values, state = self.keys().elements, self.values().elements, self.state().elements
        size = self.dtype.itemsize
        blocks = size * (4 * keys + 3 * values + state) + 4 * 2 * state
        numbers = 3 * 4 * max(8, self.heads_per_step) * max(LANES, self.chunk)
        gates = 2 * 4 * keys if self.channel else numbers
        levels = self.chunk.bit_length() - 1 if self.channel else 0
        one_head = (6 + 2 * levels) * self.key_lanes + 2 * self.value_lanes + 6 * max(LANES, self.chunk)
        # Products in float32 are made of parts of their operands.
        parts = 2 if self.dtype.itemsize == 4 else 1
        temporaries = 4 * (parts * self.chunk * one_head + (2 + levels // 2) * keys)
        return 2 * (blocks + gates) + temporaries

    @property
    def vmem_limit(self) -> int:
        """What the compiler may use: somewhat more than it should need, and never less than it may use anyway."""
        return max(DEFAULT_VMEM_LIMIT, self.vmem_bytes * 5 // 4)

    def key_slice(self, head: int) -> slice:
        """Where a step's head lies in a block of keys."""
        return slice(head * self.key_lanes, (head + 1) * self.key_lanes)

    def value_slice(self, head: int) -> slice:
        """Where a step's head lies in a block of values."""
        return slice(head * self.value_lanes, (head + 1) * self.value_lanes)

    def keys(self, batch: int | None = None) -> Blocks:
        """[B, N C, H K]; a `batch` of 1 is shared by all sequences."""
        return self._token_blocks(self.key_lanes, self.batch if batch is None else batch)

    def values(self) -> Blocks:
        """[B, N C, H V]."""
        return self._token_blocks(self.value_lanes, self.batch)

    def _token_blocks(self, width: int, batch: int) -> Blocks:
        shape = (batch, self.chunks * self.chunk, self.heads * width)
        block = (None, self.chunk, self.heads_per_step * width)
        return Blocks(shape, block, lambda b, h, n: (b if batch > 1 else 0, n, h))

    def numbers_per_token(self, batch: int, count: int) -> Blocks:
        """[B, H / heads, N, count heads, C]: `count` numbers for each token of each head, along lanes."""
        _, groups, chunks = self.grid
        rows = count * self.heads_per_step
        shape = (batch, groups, chunks, rows, self.chunk)
        block = (None, None, None, rows, self.chunk)
        return Blocks(shape, block, lambda b, h, n: (b if batch > 1 else 0, h, n, 0, 0))

    def state(self) -> Blocks:
        """[B, H, V, K], the same block at every chunk."""
        state = (self.value_lanes, self.key_lanes)
        shape = (self.batch, self.heads, *state)
        return Blocks(shape, (None, self.heads_per_step, *state), lambda b, h, n: (b, h, 0, 0))

    def states(self) -> Blocks:
        """[B, N, H, V, K], one for each chunk."""
        state = (self.value_lanes, self.key_lanes)
        shape = (self.batch, self.chunks, self.heads, *state)
        return Blocks(shape, (None, None, self.heads_per_step, *state), lambda b, h, n: (b, n, h, 0, 0))

    def lay_out_tokens(self, x: jax.Array, lanes: int) -> jax.Array:
        """[B, T, H, width] -> [B, N C, H lanes]."""
        batch, tokens, heads, width = x.shape
        fill = ((0, 0), (0, self.chunks * self.chunk - tokens), (0, 0), (0, lanes - width))
        return jnp.pad(x, fill).reshape(batch, -1, heads * lanes)

    def restore_tokens(self, x: jax.Array, width: int) -> jax.Array:
        """[B, N C, H lanes] -> [B, T, H, width]."""
        return x.reshape(*x.shape[:2], self.heads, -1)[:, : self.tokens, :, :width]

    def lay_out_state(self, x: jax.Array) -> jax.Array:
        """[B, H, K, V] -> [B, H, V, K], where a decay lies along lanes as the keys do."""
        fill = ((0, 0), (0, 0), (0, self.value_lanes - self.value_width), (0, self.key_lanes - self.key_width))
        return jnp.pad(jnp.swapaxes(x, 2, 3), fill)

    def restore_state(self, x: jax.Array) -> jax.Array:
        """[B, H, V, K] -> [B, H, K, V]."""
        return jnp.swapaxes(x[:, :, : self.value_width, : self.key_width], 2, 3)

    def lay_out_numbers(self, x: jax.Array) -> jax.Array:
        """[B or 1, T, H] -> [B or 1, H / heads, N, heads, C]."""
        batch, tokens, _ = x.shape
        x = jnp.pad(x, ((0, 0), (0, self.chunks * self.chunk - tokens), (0, 0)))
        x = x.reshape(batch, self.chunks, self.chunk, -1, self.heads_per_step)
        return x.transpose(0, 3, 1, 4, 2)

    def restore_numbers(self, x: jax.Array) -> jax.Array:
        """[B, H / heads, N, heads, C] -> [B, T, H]."""
        return x.transpose(0, 2, 4, 1, 3).reshape(x.shape[0], -1, self.heads)[:, : self.tokens]


def choose_tiling(
    shape: tuple[int, ...],
    value_width: int,
    *,
    channel: bool,
    dtype: jnp.dtype,
    chunk_size: int | None,
    heads_per_step: int | None,
    generation: Generation,
) -> Tiling:
    """Cuts a call so that the blocks of a step fit VMEM, and all cores have work where there is enough.

    Args:
        shape: q's, [B, T, H, K].
        value_width: V.
        channel: whether every key channel has a gate.
        dtype: of q, k and v.
        chunk_size: tokens per chunk as asked for, or None for as many as the matrix unit has rows; kept between 16 and
            256, and no larger than T needs.
        heads_per_step: heads that a step computes, at most; None for as many as pay.
        generation: of the chip.

    Raises:
        NotImplementedError: where one head doesn't fit.
    """
    batch, tokens, heads, key_width = shape
    chunk = min(chunk_size or generation.matrix_unit, 1 << (tokens - 1).bit_length())
    chunk = min(max(chunk, SMALLEST_CHUNK), LARGEST_CHUNK)
    sizes = (batch, tokens, heads, key_width, value_width, chunk)
    groups = [group for group in range(min(heads_per_step or MOST_HEADS, heads), 0, -1) if heads % group == 0]
    tilings = [Tiling(*sizes, group, channel, jnp.dtype(dtype)) for group in groups]
    fitting = [tiling for tiling in tilings if tiling.vmem_bytes <= generation.budget]
    if not fitting:
        raise NotImplementedError(
            f"a head of K = {key_width}, V = {value_width} with chunks of {chunk} tokens takes "
            f"{tilings[-1].vmem_bytes / 2**20:.1f} MiB of VMEM, and it may take {generation.budget / 2**20:.1f}"
        )
    shared_out = (tiling for tiling in fitting if math.prod(tiling.grid[:2]) % generation.cores == 0)
    return next(shared_out, fitting[0])
