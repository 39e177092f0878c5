"""Kernel: gradients of queries, keys and gates, for one decay per token and head, each chunk on its own."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.decays import Decays, sums_of, tokens_at, write_positions
from zeco_jax.attention.hopper.gradients_scalar import gate_parts
from zeco_jax.attention.hopper.launch import (
    COMPUTING_REGISTERS,
    PRODUCER_REGISTERS,
    bfloat16,
    hidden_zero,
    launch,
    stage_of,
)
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

# Tiles of the values in flight, with the states'.
_SLOTS = 2
_FLIPPED = (1, 0)
_SQUARE = (CHUNK, CHUNK)


def chunk_gradients_scalar(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sums: jax.Array,
    dout: jax.Array,
    states: jax.Array,
    leaving: jax.Array,
    *,
    walk: Walk,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """As `gradients_scalar` with states of several tiles, but for the gradients of the values.

    A block of threads takes a tile of the keys and goes through all tiles of the values. Each of its warpgroups does so
    for half of the keys' channels, and neither waits for the other.

    Args:
        q: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        k: [B, T, H, K] bfloat16.
        v: [B, T, H, V] bfloat16, V a multiple of TILE.
        sums: [B or 1, H, T] float32, the gates' sums since each chunk began.
        dout: [B, T, H, V] bfloat16.
        states: [B, H, chunks, K, V] bfloat16, the state that enters each chunk.
        leaving: [B, H, chunks, K, V] bfloat16, the cotangent of the state that leaves each chunk.
        walk: which chunks a block of threads takes.
        scale: factor on the outputs.
        interpret: simulate the kernel.

    Returns:
        dq and dk [B, T, H, K] bfloat16; z, u and w [K / HALF, B, H, T] and x [K / HALF, B, H, chunks, HALF] float32
        for `gate_gradient`.
    """
    batch, tokens, heads, width = q.shape
    keys = tile.bf16_tile(COMPUTING, CHUNK, HALF)
    values = tile.bf16_tile(_SLOTS, CHUNK, TILE)
    borders = tile.bf16_tile(_SLOTS, TILE, TILE)
    return launch(
        partial(_gradients, walk=walk, scale=scale),
        (q, k, v, sums, dout, states, leaving),
        (
            bfloat16(*q.shape),
            bfloat16(*k.shape),
            *gate_parts(width // HALF, batch, heads, tokens),
        ),
        {
            # Where they have been read, what is summed for the gates takes their place, then the gradients.
            "q_tile": keys,
            "k_tile": keys,
            "v_tile": values,
            "dout_tile": values,
            "state_tile": borders,
            "leaving_tile": borders,
            # The gates' sums, and the positions, for each warpgroup its own: here racecheck sees both write them.
            "vectors": plgpu.SMEM((1 + COMPUTING, CHUNK), jnp.float32),
            "keys_fetched": plgpu.Barrier(num_arrivals=2 * COMPUTING + 1),
            "keys_used": plgpu.Barrier(num_arrivals=COMPUTING),
            "fetched": plgpu.Barrier(num_arrivals=4, num_barriers=_SLOTS),
            "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
        },
        name="chunk_gradients_scalar",
        stretches=walk.stretches,
        # A block of threads goes through all tiles of the values.
        state=(batch, heads, width, TILE),
        interpret=interpret,
    )


def _gradients(
    q: Ref,
    k: Ref,
    v: Ref,
    sums: Ref,
    dout: Ref,
    states: Ref,
    leaving: Ref,
    nothing: Ref,
    dq: Ref,
    dk: Ref,
    z: Ref,
    u: Ref,
    w: Ref,
    x: Ref,
    *,
    walk: Walk,
    scale: float,
    q_tile: Ref,
    k_tile: Ref,
    v_tile: Ref,
    dout_tile: Ref,
    state_tile: Ref,
    leaving_tile: Ref,
    vectors: Ref,
    keys_fetched: Ref,
    keys_used: Ref,
    fetched: Ref,
    used: Ref,
    staging: Ref | None,
) -> None:
    batch, head, stretch, key_tile = (lax.axis_index(name) for name in ("batch", "head", "stretch", "key_tile"))
    warpgroup = lax.axis_index("warpgroup")
    steps = walk.steps(stretch)
    value_tiles = v.shape[-1] // TILE
    sums_tile = vectors.at[0]

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        of_keys = pl.ds(key_tile * TILE, TILE)

        @pl.loop(0, steps)
        def _step(step: jax.Array) -> None:
            chunk = walk.chunk(stretch, step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)

            def fetch_values(value_tile: int | jax.Array) -> None:
                place = step * value_tiles + value_tile
                slot, of_values = lax.rem(place, _SLOTS), pl.ds(value_tile * TILE, TILE)
                pl.when(place >= _SLOTS)(lambda: plgpu.barrier_wait(used.at[slot]))
                for source, target in ((dout, dout_tile), (v, v_tile)):
                    source = source.at[batch, tokens, head, of_values]
                    plgpu.copy_gmem_to_smem(source, target.at[slot], fetched.at[slot])
                for source, target in ((states, state_tile), (leaving, leaving_tile)):
                    source = source.at[batch, head, chunk, of_keys, of_values]
                    plgpu.copy_gmem_to_smem(source, target.at[slot], fetched.at[slot])

            # Before the keys, which wait until the last chunk's gradients have left their place.
            ahead = min(value_tiles, _SLOTS)
            for value_tile in range(ahead):
                fetch_values(value_tile)
            pl.when(step >= 1)(lambda: plgpu.barrier_wait(keys_used))
            plgpu.copy_gmem_to_smem(sums_of(sums, batch, head, tokens), sums_tile, keys_fetched)
            for source, target in ((q, q_tile), (k, k_tile)):
                for index in range(COMPUTING):
                    half = pl.ds(key_tile * TILE + index * HALF, HALF)
                    plgpu.copy_gmem_to_smem(source.at[batch, tokens, head, half], target.at[index], keys_fetched)
            pl.loop(ahead, value_tiles)(fetch_values)

        # A barrier may not go while somebody has still to pass it.
        plgpu.barrier_wait(keys_used)
        places = steps * value_tiles

        @pl.loop(jnp.maximum(places - _SLOTS, 0), places)
        def _drain(place: jax.Array) -> None:
            plgpu.barrier_wait(used.at[lax.rem(place, _SLOTS)])

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        stage = stage_of(staging, warpgroup)
        positions = vectors.at[1 + warpgroup]
        write_positions(positions)
        plgpu.commit_smem()

        @pl.loop(0, steps + nothing[0])
        def _step(step: jax.Array) -> None:
            chunk = walk.chunk(stretch, step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            mine = warpgroup + hidden_zero(step)
            part = (key_tile * COMPUTING + mine, batch, head)
            own_q, own_k = q_tile.at[mine], k_tile.at[mine]
            decays = Decays(sums_tile, positions)

            def pass_values(value_tile: jax.Array, passed: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                slot = lax.rem(step * value_tiles + value_tile, _SLOTS)
                own = tile.half(mine)
                douts, values = dout_tile.at[slot], v_tile.at[slot]
                own_state, own_leaving = state_tile.at[slot, own], leaving_tile.at[slot, own]
                plgpu.barrier_wait(fetched.at[slot])
                # The first two hold the same: queries need them as one left factor, keys as the other.
                factors = (
                    (douts, values),
                    (values, douts),
                    (douts, own_state),
                    (values, own_leaving),
                    (own_state, own_leaving),
                )
                jobs = ([(left, right.transpose(_FLIPPED))] for left, right in factors)
                passed = tile.added_products(*zip(passed, jobs, strict=True), staging=stage)
                plgpu.barrier_arrive(used.at[slot])
                return passed

            passed = lax.fori_loop(0, value_tiles, pass_values, tuple(tile.zeros(*_SQUARE) for _ in range(5)))
            weights, flipped, dq_own, dk_own, crossing = passed
            plgpu.barrier_wait(keys_fetched)
            row, column = tokens_at(positions)
            x[*part, chunk] = jnp.sum(jnp.where(row == column, crossing, 0.0), axis=1) * decays.whole()
            dq_own *= tile.along_rows(decays.before() * scale, HALF)
            u[*part, tokens] = jnp.sum(tile.load(own_q) * dq_own, axis=1)
            dk_own *= tile.along_rows(decays.after(), HALF)
            w[*part, tokens] = jnp.sum(tile.load(own_k) * dk_own, axis=1)

            weights *= decays.between() * scale
            flipped *= decays.between(transposed=True) * scale
            scores, dq_own, dk_own = tile.added_products(
                (tile.zeros(*_SQUARE), [(own_k, own_q.transpose(_FLIPPED))]),
                (dq_own, [(weights.astype(jnp.bfloat16), own_k)]),
                (dk_own, [(flipped.astype(jnp.bfloat16), own_q)]),
                staging=stage,
            )
            # Every warp is done with its products, here and below.
            plgpu.commit_smem()
            own_q[...], own_k[...] = tile.split(scores * flipped)
            plgpu.commit_smem()
            row, column = tokens_at(positions)
            earlier = tile.ones_where(column < row)
            moved = tile.product(_SQUARE, (earlier, own_q), (earlier, own_k), staging=stage)
            row, column = tokens_at(positions)
            z[*part, tokens] = jnp.sum(jnp.where(column >= row, moved, 0.0), axis=1)

            own_keys = pl.ds((key_tile * COMPUTING + mine) * HALF, HALF)
            plgpu.commit_smem()
            for gradient, work, target in ((dq_own, own_q, dq), (dk_own, own_k, dk)):
                tile.write(work, gradient.astype(jnp.bfloat16))
                plgpu.copy_smem_to_gmem(work, target.at[batch, tokens, head, own_keys])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(keys_used)

        plgpu.wait_smem_to_gmem(0)
