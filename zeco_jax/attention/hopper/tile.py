"""What the kernels share: the sizes of a tile, how it lies in memory and registers, products on the tensor cores."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Tokens of a chunk: the rows of a wgmma.
CHUNK = 64
# A block of threads holds a state of TILE x TILE; each of its two computing warpgroups prepares HALF of the channels.
TILE = 128
HALF = 64
COMPUTING = 2
PRODUCER = COMPUTING

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
COLUMN = WGMMA.reduce(0)
BF16_TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
FP32_TILES = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))

# Gates below have a float32 exponential of 0; sums of a chunk of them keep their small parts.
WEAKEST_GATE = -120.0
# While no channel of a chunk decays by more than e^-50, exp(-b) of its sums b, and products with it, stay in range.
FACTORED_LIMIT = -50.0
LOG2_E = math.log2(math.e)

Ref = Any
Factors = tuple[jax.Array | Ref, Ref]


def bf16_tile(*shape: int) -> plgpu.SMEM:
    """Shared memory that TMA fills and wgmma reads."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=BF16_TILES)


def fp32_tile(*shape: int) -> plgpu.SMEM:
    """Shared memory that TMA fills and that registers read without bank conflicts."""
    return plgpu.SMEM(shape, jnp.float32, transforms=FP32_TILES)


def half(warpgroup: jax.Array) -> pl.Slice:
    """The channels (or values) of a tile that a warpgroup prepares."""
    return pl.ds(warpgroup * HALF, HALF)


def own_head(head: jax.Array, warpgroup: jax.Array, *, paired: bool) -> jax.Array:
    """The head whose states a warpgroup holds.

    Two heads of HALF channels of keys and of values may be paired: side by side they make up a tile, and each is one
    warpgroup's. What is summed over all channels of a head then is that warpgroup's alone.

    Args:
        head: of the tile.
        warpgroup: which one this is.
        paired: whether the tile is two heads.
    """
    return COMPUTING * head + warpgroup if paired else head


def heads_per_tile(*, paired: bool) -> int:
    """How many heads share a tile."""
    return COMPUTING if paired else 1


def heads_of(head: jax.Array, *, paired: bool) -> list[jax.Array]:
    """The heads of a tile."""
    return [own_head(head, warpgroup, paired=paired) for warpgroup in range(heads_per_tile(paired=paired))]


def in_state(channels: pl.Slice, *, paired: bool) -> pl.Slice:
    """Where a warpgroup's channels are in the states of `own_head`: of a paired head it has all."""
    return pl.ds(0, HALF) if paired else channels


def state_shape(heads: int, *, paired: bool) -> tuple[int, int, int]:
    """Heads, keys and values of states where a tile is a head, or two."""
    return (COMPUTING * heads, HALF, HALF) if paired else (heads, TILE, TILE)


def load(ref: Ref) -> jax.Array:
    """A matrix from shared memory, as wgmma lays out its results, in float32."""
    return plgpu.load(ref, layout=WGMMA).astype(jnp.float32)


def load_global(ref: Ref, layout: plgpu.Layout = WGMMA) -> jax.Array:
    """A matrix or vector straight from device memory; or from shared memory, as rows and as columns."""
    # Inside shard_map what is read there varies over the mesh, and nothing else in a kernel does; a product forgets it.
    return plgpu.load(ref, layout=layout, optimized=False) * 1.0


def least(vector: Ref, place: Ref) -> jax.Array:
    """The least number of a vector of at least 8, in shared or device memory.

    Args:
        vector: float32.
        place: shared memory [HALF] float32 that this warpgroup may write to.
    """
    # Laid out as columns: a reduction along them stays within a warp.
    found = jnp.min(load_global(vector, layout=COLUMN))
    # Read from memory it is known to be the same in all threads, and what depends on it to be no divergence.
    plgpu.commit_smem()
    write(place, ones(HALF) * found)
    return place[0]


def zeros(*shape: int) -> jax.Array:
    """A matrix of zeros, laid out as wgmma lays out its results."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def ones(columns: int) -> jax.Array:
    """A one for each column."""
    return plgpu.layout_cast(jnp.ones(columns, jnp.float32), COLUMN)


def indices() -> tuple[jax.Array, jax.Array]:
    """Row and column of each element of a chunk's scores."""
    shape = (CHUNK, CHUNK)
    return tuple(plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA) for axis in (0, 1))


def ones_where(condition: jax.Array) -> jax.Array:
    """A matrix of 1 and 0, exact in bfloat16, as the left factor of a product."""
    return condition.astype(jnp.float32).astype(jnp.bfloat16)


def along_rows(vector: jax.Array, columns: int) -> jax.Array:
    """One number per row, repeated over the columns."""
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0])


def along_columns(vector: jax.Array, rows: int) -> jax.Array:
    """One number per column, repeated over the rows."""
    return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1])


def products(*jobs: tuple[tuple[int, int], Sequence[Factors]], staging: Ref | None) -> tuple[jax.Array, ...]:
    """Sums of matrix products, all under way at once; a left factor may be in registers, a right one is in memory.

    Args:
        *jobs: shape of the result, and the factors of its terms.
        staging: None; in interpret mode, which knows no factors in registers, memory [CHUNK, CHUNK] to put them.
    """

    def multiply(*results: Ref) -> tuple[jax.Array, ...]:
        _multiply(results, [terms for _, terms in jobs], staging)
        return tuple(result[...] for result in results)

    return pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape, _ in jobs))


def added_products(*jobs: tuple[jax.Array, Sequence[Factors]], staging: Ref | None) -> tuple[jax.Array, ...]:
    """As `products`, but added to matrices, in the registers where these are.

    Args:
        *jobs: what is added to, and the factors of the terms.
        staging: as in `products`; interpret mode knows no such registers either, and adds afterwards.
    """
    if staging is not None:
        found = products(*((x.shape, terms) for x, terms in jobs), staging=staging)
        return tuple(x + y for (x, _), y in zip(jobs, found, strict=True))

    def multiply(results: tuple[Ref, ...]) -> None:
        _multiply(results, [terms for _, terms in jobs], staging)

    return pl.run_state(multiply)(tuple(plgpu.ACC.init(x) for x, _ in jobs))


def _multiply(results: Sequence[Ref], jobs: Sequence[Sequence[Factors]], staging: Ref | None) -> None:
    for result, terms in zip(results, jobs, strict=True):
        for left, right in terms:
            if staging is not None and isinstance(left, jax.Array):
                staging[...] = left
                plgpu.commit_smem()
                left = staging
            plgpu.wgmma(result, left, right)


def product(shape: tuple[int, int], *terms: Factors, staging: Ref | None) -> jax.Array:
    """A sum of matrix products: `products` with one job."""
    return products((shape, terms), staging=staging)[0]


def split(x: jax.Array, *, rounded: bool = False) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 numbers that sum to a float32 one, to 2^-16 of it: sums of gates need more than bfloat16.

    Args:
        x: float32.
        rounded: the first is the nearest to `x`, for whoever takes it alone; otherwise `x` cut off, which leaves it off
            by up to 2^-7, always towards zero, and takes one instruction less for each number.
    """
    # By hand: converting one number there and back takes eight times as long as converting two at once.
    bits = lax.bitcast_convert_type(x, jnp.int32)
    if rounded:
        bits += jnp.int32(0x8000)
    bits &= jnp.int32(-0x10000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def scaled_exp(x: jax.Array, scale: float) -> jax.Array:
    """The exponential of `x` times `scale`, which costs nothing if it is positive: it is added to the exponent."""
    if scale > 0:
        return jnp.exp2(x * LOG2_E + math.log2(scale))
    return jnp.exp(x) * scale


def write(ref: Ref, x: jax.Array) -> None:
    """Writes a matrix to shared memory, where wgmma and TMA find it."""
    ref[...] = x
    plgpu.commit_smem()


def write_split(pair: Ref, x: jax.Array) -> None:
    """Writes the two parts of `x` [CHUNK, HALF] where `summed` reads them."""
    pair[0], pair[1] = split(x)


def summed(weights: jax.Array | Ref, pair: Ref, *, staging: Ref | None) -> jax.Array:
    """Sums over tokens with weights 0 and 1 of what `write_split` wrote, to nearly float32's precision."""
    return product((CHUNK, HALF), (weights, pair.at[0]), (weights, pair.at[1]), staging=staging)
