"""Kernel: the scores of chunks that decay strongly, for a decay per key channel."""

from collections.abc import Callable
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
    hidden_zero,
    launch,
    stage_of,
)
from zeco_jax.attention.hopper.passes import Passes
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk


def exact_scores(
    q: jax.Array,
    k: jax.Array,
    gates: jax.Array,
    strong: jax.Array,
    some_strong: jax.Array,
    *,
    walk: Walk,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    r"""The scores within those chunks that `decayed_scores` leaves out, by the passes of `passes.py`.

    .. math:: P_{ij} = \text{scale} (q_i \odot e^{b_i - b_j}) k_j^\top \quad (j \le i)

    with :math:`b` the gates' sums since the chunk began.

    Args:
        q: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        k: [B, T, H, K] bfloat16.
        gates: [B, T, H, K] float32.
        strong: [B, H, chunks] int32, which chunks are asked for.
        some_strong: [B, H, stretches] int32, where a stretch has any.
        walk: which chunks a block of threads takes, forward.
        scale: factor on the scores.
        interpret: simulate the kernel.

    Returns:
        [B, H, chunks, 2, CHUNK, CHUNK] bfloat16, in two parts that are to be summed; anything in the other chunks.
    """
    batch, _, heads, width = q.shape
    halves = tile.bf16_tile(COMPUTING, CHUNK, HALF)
    (scores,) = launch(
        partial(_score, key_tiles=width // TILE, walk=walk, scale=scale),
        (q, k, gates, strong, some_strong),
        (bfloat16(batch, heads, walk.chunks, 2, CHUNK, CHUNK),),
        {
            "q_tile": tile.bf16_tile(CHUNK, TILE),
            "k_tile": tile.bf16_tile(CHUNK, TILE),
            "gates_tile": tile.fp32_tile(CHUNK, TILE),
            "pairs": tile.bf16_tile(COMPUTING, 2, CHUNK, HALF),
            "parts": tile.fp32_tile(COMPUTING, CHUNK, CHUNK),
            "k_decayed": halves,
            "numbers": plgpu.SMEM((TILE,), jnp.float32),
            "scores_tile": halves,
            "fetched": plgpu.Barrier(num_arrivals=3),
            "used": plgpu.Barrier(num_arrivals=COMPUTING),
            "scored": plgpu.Barrier(num_arrivals=COMPUTING),
            "scores_read": plgpu.Barrier(num_arrivals=COMPUTING),
        },
        name="exact_scores",
        stretches=walk.stretches,
        # A block of threads goes through all tiles of the keys.
        state=(batch, heads, TILE, TILE),
        interpret=interpret,
    )
    return scores


def _score(
    q: Ref,
    k: Ref,
    gates: Ref,
    strong: Ref,
    some_strong: Ref,
    nothing: Ref,
    scores: Ref,
    *,
    key_tiles: int,
    walk: Walk,
    scale: float,
    q_tile: Ref,
    k_tile: Ref,
    gates_tile: Ref,
    pairs: Ref,
    parts: Ref,
    k_decayed: Ref,
    numbers: Ref,
    scores_tile: Ref,
    fetched: Ref,
    used: Ref,
    scored: Ref,
    scores_read: Ref,
    staging: Ref | None,
) -> None:
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    warpgroup = lax.axis_index("warpgroup")
    # Most stretches have no such chunk: nothing is read for them but this.
    steps = jnp.where(some_strong[batch, head, stretch] != 0, walk.steps(stretch), 0)

    def in_strong_chunks(visit: Callable[[jax.Array, jax.Array], None]) -> None:
        @pl.loop(0, steps)
        def _step(step: jax.Array) -> None:
            chunk = walk.chunk(stretch, step)
            pl.when(strong[batch, head, chunk] != 0)(lambda: visit(step, chunk))

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        def fetch(step: jax.Array, chunk: jax.Array) -> None:
            del step
            tokens = pl.ds(chunk * CHUNK, CHUNK)

            @pl.loop(0, key_tiles)
            def _tile(key_tile: jax.Array) -> None:
                of_keys = pl.ds(key_tile * TILE, TILE)
                for source, target in ((gates, gates_tile), (k, k_tile), (q, q_tile)):
                    plgpu.copy_gmem_to_smem(source.at[batch, tokens, head, of_keys], target, fetched)
                plgpu.barrier_wait(used)

        in_strong_chunks(fetch)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        stage = stage_of(staging, warpgroup)

        def compute(step: jax.Array, chunk: jax.Array) -> None:
            mine = warpgroup + hidden_zero(step + nothing[0])
            own = tile.half(mine)
            pair, own_keys = pairs.at[mine], k_decayed.at[mine]

            def add_tile(key_tile: jax.Array, part: jax.Array) -> jax.Array:
                del key_tile
                plgpu.barrier_wait(fetched)
                q_own, k_own = q_tile.at[:, own], k_tile.at[:, own]
                tile.write_split(pair, jnp.maximum(tile.load(gates_tile.at[:, own]), tile.WEAKEST_GATE))

                over = Passes.of(pair, numbers.at[own], staging=stage)

                def add_pass(which: jax.Array, found: jax.Array) -> jax.Array:
                    # No warp may still be reading what is about to be written.
                    plgpu.commit_smem()
                    of_queries, of_keys = over.decays(which, pair, staging=stage)
                    own_keys[...] = (tile.load(k_own) * of_keys).astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    queries = (tile.load(q_own) * of_queries * scale).astype(jnp.bfloat16)
                    reaching = tile.product((CHUNK, CHUNK), (queries, own_keys.transpose((1, 0))), staging=stage)
                    return found + jnp.where(over.parted(which), reaching, 0.0)

                part = lax.fori_loop(over.first, over.end, add_pass, part)
                # Both have been read.
                plgpu.commit_smem()
                plgpu.barrier_arrive(used)
                return part

            part = lax.fori_loop(0, key_tiles, add_tile, tile.zeros(CHUNK, CHUNK))
            place = scores.at[batch, head, chunk]
            write_scores(part, parts, scores_tile, place, mine, scored=scored, scores_read=scores_read)
            plgpu.barrier_wait(scores_read)

        in_strong_chunks(compute)
        plgpu.wait_smem_to_gmem(0)
