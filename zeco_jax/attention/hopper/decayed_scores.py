"""Kernel: all of the outputs' work that doesn't depend on values or states, for a decay per key channel."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.halves import write_scores
from zeco_jax.attention.hopper.launch import (
    COMPUTING_REGISTERS,
    PRODUCER_REGISTERS,
    bfloat16,
    float32,
    hidden_zero,
    launch,
    stage_of,
)
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

_SLOTS = 2
# Columns of a product.
_FEWEST = 8
_FLIPPED = (1, 0)


def decayed_scores(
    q: jax.Array,
    k: jax.Array,
    gates: jax.Array,
    *,
    walk: Walk,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    r"""Queries and keys decayed to the borders of their chunk, and the scores within it.

    .. math::
        \text{scale}\; e^{b_i} \odot q_i, \qquad e^{b_C - b_j} \odot k_j, \qquad
        P_{ij} = \text{scale} (q_i \odot e^{b_i - b_j}) k_j^\top \quad (j \le i)

    with :math:`b` the gates' sums since the chunk began. Where many tiles of values meet the same queries and keys,
    each reads these instead of the gates. Scores come from factors :math:`e^{b_i}` and :math:`e^{-b_j}`, the second of
    which overflows in strongly decaying chunks: these are left to `exact_scores`.

    Args:
        q: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        k: [B, T, H, K] bfloat16.
        gates: [B, T, H, K] float32.
        walk: which chunks a block of threads takes, forward.
        scale: factor on the outputs.
        interpret: simulate the kernel.

    Returns:
        Queries [B, T, H, K] bfloat16, decayed from the start of their chunk, times the scale; keys [B, T, H, K]
        bfloat16, decayed to the end of their chunk; the gates' sums over each chunk [B, H, chunks, K] float32; and the
        scores [B, H, chunks, 2, CHUNK, CHUNK] bfloat16, in two parts that are to be summed: anything in chunks where
        one of these sums is below FACTORED_LIMIT.
    """
    batch, _, heads, width = q.shape
    halves = tile.bf16_tile(COMPUTING, CHUNK, HALF)
    return launch(
        partial(_score, key_tiles=width // TILE, walk=walk, scale=scale),
        (q, k, gates),
        (
            bfloat16(*q.shape),
            bfloat16(*k.shape),
            float32(batch, heads, walk.chunks, width),
            bfloat16(batch, heads, walk.chunks, 2, CHUNK, CHUNK),
        ),
        {
            "q_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
            "k_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
            "gates_tile": tile.fp32_tile(_SLOTS, CHUNK, TILE),
            # The halves' parts of the scores take the place of the gates, once these are summed.
            "work": plgpu.RefUnion(tile.bf16_tile(COMPUTING, 2, CHUNK, HALF), tile.fp32_tile(COMPUTING, CHUNK, CHUNK)),
            # Ones up to and including the diagonal, and above it.
            "triangles": tile.bf16_tile(COMPUTING, CHUNK, CHUNK),
            "q_decayed": halves,
            "k_decayed": halves,
            "scores_tile": tile.bf16_tile(COMPUTING, CHUNK, CHUNK),
            "fetched": plgpu.Barrier(num_arrivals=3, num_barriers=_SLOTS),
            "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
            "scored": plgpu.Barrier(num_arrivals=COMPUTING),
            "scores_read": plgpu.Barrier(num_arrivals=COMPUTING),
        },
        name="decayed_scores",
        stretches=walk.stretches,
        # A block of threads goes through all tiles of the keys.
        state=(batch, heads, TILE, TILE),
        interpret=interpret,
    )


def _score(
    q: Ref,
    k: Ref,
    gates: Ref,
    nothing: Ref,
    queries: Ref,
    keys: Ref,
    totals: Ref,
    scores: Ref,
    *,
    key_tiles: int,
    walk: Walk,
    scale: float,
    q_tile: Ref,
    k_tile: Ref,
    gates_tile: Ref,
    work: Ref,
    triangles: Ref,
    q_decayed: Ref,
    k_decayed: Ref,
    scores_tile: Ref,
    fetched: Ref,
    used: Ref,
    scored: Ref,
    scores_read: Ref,
    staging: Ref | None,
) -> None:
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    warpgroup = lax.axis_index("warpgroup")
    steps = walk.steps(stretch)
    pairs, scores_parts = work

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        @pl.loop(0, steps * key_tiles)
        def _place(place: jax.Array) -> None:
            slot = lax.rem(place, _SLOTS)
            step, key_tile = lax.div(place, key_tiles), lax.rem(place, key_tiles)
            tokens, of_keys = pl.ds(walk.chunk(stretch, step) * CHUNK, CHUNK), pl.ds(key_tile * TILE, TILE)
            pl.when(place >= _SLOTS)(lambda: plgpu.barrier_wait(used.at[slot]))
            for source, target in ((gates, gates_tile), (k, k_tile), (q, q_tile)):
                plgpu.copy_gmem_to_smem(source.at[batch, tokens, head, of_keys], target.at[slot], fetched.at[slot])

        # A barrier may not go while somebody has still to pass it.
        @pl.loop(jnp.maximum(steps * key_tiles - _SLOTS, 0), steps * key_tiles)
        def _drain(place: jax.Array) -> None:
            plgpu.barrier_wait(used.at[lax.rem(place, _SLOTS)])

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        stage = stage_of(staging, warpgroup)
        rows, columns = tile.indices()
        # In memory: ptxas 13.0 sets registers of constant weights after the product that reads them.
        # Both warpgroups write the same.
        triangles[0], triangles[1] = tile.ones_where(columns <= rows), tile.ones_where(columns > rows)
        plgpu.commit_smem()

        def step_body(step: jax.Array, _: None) -> None:
            chunk = walk.chunk(stretch, step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            zero = hidden_zero(step)
            mine = warpgroup + zero
            own = tile.half(mine)
            pair, own_queries, own_keys = pairs.at[mine], q_decayed.at[mine], k_decayed.at[mine]
            # Where the scores will be.
            factored_keys = scores_tile.at[mine]
            lower, above = (triangles.at[i + zero] for i in range(COMPUTING))
            pl.when(step >= 1)(lambda: plgpu.barrier_wait(scores_read))

            def add_tile(key_tile: jax.Array, part: jax.Array) -> jax.Array:
                place = step * key_tiles + key_tile
                slot = lax.rem(place, _SLOTS)
                plgpu.barrier_wait(fetched.at[slot])
                q_own, k_own = q_tile.at[slot, :, own], k_tile.at[slot, :, own]
                gate = jnp.maximum(tile.load(gates_tile.at[slot, :, own]), tile.WEAKEST_GATE)
                # What is about to be written over has left, and every warp is done with its products.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                tile.write_split(pair, gate)
                plgpu.commit_smem()
                parts = [pair.at[i + zero] for i in range(2)]
                since, later = tile.products(
                    *(((CHUNK, HALF), [(triangle, x) for x in parts]) for triangle in (lower, above)),
                    staging=stage,
                )
                own_keys[...] = (tile.load(k_own) * jnp.exp(later)).astype(jnp.bfloat16)
                factored_keys[...] = (tile.load(k_own) * jnp.exp(-since)).astype(jnp.bfloat16)
                high, low = tile.split(tile.load(q_own) * tile.scaled_exp(since, scale), rounded=True)
                own_queries[...] = high
                plgpu.barrier_arrive(used.at[slot])
                plgpu.commit_smem()
                places = pl.ds(key_tile * TILE + mine * HALF, HALF)
                plgpu.copy_smem_to_gmem(own_queries, queries.at[batch, tokens, head, places])
                plgpu.copy_smem_to_gmem(own_keys, keys.at[batch, tokens, head, places])
                part, total = tile.added_products(
                    (part, [(x, factored_keys.transpose(_FLIPPED)) for x in (high, low)]),
                    # The two triangles together are ones alone: every column is the same but for rounding.
                    (
                        tile.zeros(HALF, _FEWEST),
                        [
                            (x.transpose(_FLIPPED), y)
                            for x in parts
                            for y in (
                                lower.at[pl.ds(0, _FEWEST)].transpose(_FLIPPED),
                                above.at[pl.ds(0, _FEWEST)].transpose(_FLIPPED),
                            )
                        ],
                    ),
                    staging=stage,
                )
                totals[batch, head, chunk, places] = jnp.max(total, axis=1)
                return part

            part = lax.fori_loop(0, key_tiles, add_tile, tile.zeros(CHUNK, CHUNK))
            part *= tile.load(lower)
            # The pair has been read.
            plgpu.commit_smem()
            place = scores.at[batch, head, chunk]
            write_scores(part, scores_parts, scores_tile, place, mine, scored=scored, scores_read=scores_read)

        lax.fori_loop(0, steps + nothing[0], step_body, None)
        plgpu.barrier_wait(scores_read)
        plgpu.wait_smem_to_gmem(0)
