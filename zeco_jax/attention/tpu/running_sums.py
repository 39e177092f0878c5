"""Sums along the tokens of a chunk inside a kernel, where `cumsum` doesn't compile."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

# Rows of a tile: moving whole tiles is free, moving rows inside one is not.
SUBLANES = 8


def sums_to(x: jax.Array) -> jax.Array:
    """Sums of each row and all rows before it, [C, width] float32 with C a multiple of 8."""
    tiles = _scan_tiles(_tiles(x), reverse=False)
    carried, summed = 0.0, []
    for tile in range(tiles.shape[0]):
        summed.append(tiles[tile] + carried)
        carried = summed[-1][SUBLANES - 1 :]
    return jnp.concatenate(summed, axis=0)


def sums_from(x: jax.Array) -> jax.Array:
    """Sums of each row and all rows after it, [C, width]."""
    tiles = _scan_tiles(_tiles(x), reverse=True)
    carried, summed = 0.0, []
    for tile in reversed(range(tiles.shape[0])):
        summed.append(tiles[tile] + carried)
        carried = summed[-1][:1]
    return jnp.concatenate(summed[::-1], axis=0)


def sums_after(x: jax.Array) -> jax.Array:
    """Sums of all rows after each row, [C, width]; not the difference to `sums_from`, which would lose digits."""
    own = _tiles(x)
    tiles = _scan_tiles(_move(own, 1, reverse=True), reverse=True)
    carried, summed = 0.0, []
    for tile in reversed(range(tiles.shape[0])):
        summed.append(tiles[tile] + carried)
        carried = summed[-1][:1] + own[tile, :1]
    return jnp.concatenate(summed[::-1], axis=0)


def _tiles(x: jax.Array) -> jax.Array:
    return x.reshape(-1, SUBLANES, x.shape[1])


def _scan_tiles(tiles: jax.Array, *, reverse: bool) -> jax.Array:
    """Running sums inside each tile."""
    step = 1
    while step < SUBLANES:
        tiles = tiles + _move(tiles, step, reverse=reverse)
        step *= 2
    return tiles


def _move(tiles: jax.Array, step: int, *, reverse: bool) -> jax.Array:
    """Moves the rows of each tile down (up with `reverse`), zeros behind them."""
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, tiles.shape[2]), 0)
    inside = row < SUBLANES - step if reverse else row >= step
    shift = SUBLANES - step if reverse else step
    return jnp.stack([jnp.where(inside, pltpu.roll(tile, shift, 0), 0.0) for tile in tiles])
