"""Kernel: every gradient, for a decay per key channel."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import levels, tile
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

_FLIPPED = (1, 0)
# What the exact levels find, in device memory: gradients of queries, keys and gates, and the scores.
_FOUND = 4


def gradients_channel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    dout: jax.Array,
    totals: jax.Array,
    strong: jax.Array,
    some_strong: jax.Array,
    states: jax.Array,
    leaving: jax.Array,
    *,
    walk: Walk,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    r"""The gradients of queries, keys, values and gates, one tile of the state at a time.

    With b the gates' sums since the chunk began, S the state that enters the chunk and D the cotangent of the state
    that leaves it, :math:`P_{ij}` the scores and :math:`E_{ij} = do_i \cdot v_j` for :math:`j \le i`:

    .. math::
        dq_i &= \text{scale}\; e^{b_i} \odot \Big(S do_i + \sum_j E_{ij} e^{-b_j} \odot k_j\Big) \\
        dk_j &= e^{b_C - b_j} \odot D v_j + \text{scale} \sum_i E_{ij} e^{b_i - b_j} \odot q_i \\
        dv_j &= \sum_i P_{ij} do_i + D^\top (e^{b_C - b_j} \odot k_j) \\
        dg_t &= \sum_{s \ge t} (q \odot dq - k \odot dk^{intra})_s + \sum_{s < t} (k \odot dk^{state})_s
                + e^{b_C} \odot (S \odot D) 1

    The gate's gradient is summed from factors that are rounded once and shared with the products, so that what cancels
    cancels exactly; nothing is summed over more than a chunk.

    Args:
        q: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        k: [B, T, H, K] bfloat16.
        v: [B, T, H, V] bfloat16, V a multiple of TILE.
        gates: [B, T, H, K] float32.
        dout: [B, T, H, V] bfloat16.
        totals: [B, H, chunks, K] float32, the gates' sums over each chunk.
        strong: [B, H, chunks, K / HALF] int32, which of them are too strong for exponents of both signs.
        some_strong: [B, H, stretches, K / TILE] int32, where a stretch has any.
        states: [B, H, chunks, K, V] bfloat16, the state that enters each chunk.
        leaving: [B, H, stretches, K, V] float32, the cotangent of the state that leaves each stretch.
        walk: the stretches, in reverse.
        scale: factor on the outputs.
        interpret: simulate the kernel.

    Returns:
        dq and dk [V / TILE, B, T, H, K] and dv [K / TILE, B, T, H, V] bfloat16, dgates [V / TILE, B, T, H, K] float32;
        to be summed over their first axes.
    """
    batch, tokens, heads, width = q.shape
    key_tiles, value_tiles = width // TILE, v.shape[-1] // TILE
    halves = tile.bf16_tile(COMPUTING, CHUNK, HALF)
    keys_shape = (value_tiles, batch, tokens, heads, width)
    *gradients, _ = launch(
        partial(_gradients, walk=walk, scale=scale),
        (q, k, v, gates, dout, totals, strong, some_strong, states, leaving),
        (
            bfloat16(*keys_shape),
            bfloat16(*keys_shape),
            bfloat16(key_tiles, batch, tokens, heads, v.shape[-1]),
            float32(*keys_shape),
            float32(batch, heads, walk.stretches, key_tiles, value_tiles, COMPUTING, _FOUND, CHUNK, HALF),
        ),
        {
            "q_tile": halves,
            "k_tile": halves,
            "v_tile": halves,
            "dout_tile": halves,
            "gates_tile": tile.fp32_tile(COMPUTING, CHUNK, HALF),
            # One after the other: the gates, scores, a part of the gates' gradients, gradients of queries and keys.
            "work": plgpu.RefUnion(tile.bf16_tile(COMPUTING, 2, CHUNK, HALF), tile.fp32_tile(COMPUTING, CHUNK, CHUNK)),
            # The products of outputs' cotangents and values, and the same flipped; a warpgroup computes one each.
            "weights_tile": tile.bf16_tile(COMPUTING, CHUNK, CHUNK),
            # Ones up to and including the diagonal, and below it.
            "triangles": tile.bf16_tile(2, CHUNK, CHUNK),
            # The chunk's gates, and what crosses the chunk.
            "vectors": plgpu.SMEM((2, TILE), jnp.float32),
            "state_tile": tile.bf16_tile(COMPUTING, HALF, TILE),
            # The gates' gradients take the place of the state's cotangent.
            "late_work": plgpu.RefUnion(
                tile.bf16_tile(COMPUTING, HALF, TILE),
                tile.bf16_tile(COMPUTING, 2, CHUNK, HALF),
                tile.fp32_tile(COMPUTING, CHUNK, HALF),
            ),
            "fetched": plgpu.Barrier(num_arrivals=4 * COMPUTING),
            "used": plgpu.Barrier(num_arrivals=COMPUTING),
            "gates_fetched": plgpu.Barrier(num_arrivals=COMPUTING + 1),
            "gates_used": plgpu.Barrier(num_arrivals=COMPUTING),
            "state_fetched": plgpu.Barrier(num_arrivals=COMPUTING),
            "state_used": plgpu.Barrier(num_arrivals=COMPUTING),
            "weighed": plgpu.Barrier(num_arrivals=COMPUTING),
            "prepared": plgpu.Barrier(num_arrivals=COMPUTING),
            "shared_read": plgpu.Barrier(num_arrivals=COMPUTING),
        },
        name="gradients_channel",
        walk=walk,
        state=(batch, heads, width, v.shape[-1]),
        interpret=interpret,
    )
    return tuple(gradients)


def _gradients(
    q: Ref,
    k: Ref,
    v: Ref,
    gates: Ref,
    dout: Ref,
    totals: Ref,
    strong: Ref,
    some_strong: Ref,
    states: Ref,
    leaving: Ref,
    nothing: Ref,
    dq: Ref,
    dk: Ref,
    dv: Ref,
    dgates: Ref,
    exact: Ref,
    *,
    walk: Walk,
    scale: float,
    q_tile: Ref,
    k_tile: Ref,
    v_tile: Ref,
    dout_tile: Ref,
    gates_tile: Ref,
    work: Ref,
    weights_tile: Ref,
    triangles: Ref,
    vectors: Ref,
    state_tile: Ref,
    late_work: Ref,
    fetched: Ref,
    used: Ref,
    gates_fetched: Ref,
    gates_used: Ref,
    state_fetched: Ref,
    state_used: Ref,
    weighed: Ref,
    prepared: Ref,
    shared_read: Ref,
    staging: Ref | None,
) -> None:
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    key_tile, value_tile = lax.axis_index("key_tile"), lax.axis_index("value_tile")
    warpgroup = lax.axis_index("warpgroup")
    steps = walk.steps(stretch)
    pairs, scores = work
    leaving_tile, late_pairs, dgates_tile = late_work

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        of_keys, of_values = pl.ds(key_tile * TILE, TILE), pl.ds(value_tile * TILE, TILE)

        @pl.loop(0, steps)
        def _step(step: jax.Array) -> None:
            chunk = walk.chunk(stretch, step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            again = step >= 1
            pl.when(again)(lambda: plgpu.barrier_wait(gates_used))
            plgpu.copy_gmem_to_smem(totals.at[batch, head, chunk, of_keys], vectors.at[0], gates_fetched)
            for i in range(COMPUTING):
                place = gates.at[batch, tokens, head, pl.ds(key_tile * TILE + i * HALF, HALF)]
                plgpu.copy_gmem_to_smem(place, gates_tile.at[i], gates_fetched)
            pl.when(again)(lambda: plgpu.barrier_wait(state_used))
            for i in range(COMPUTING):
                place = states.at[batch, head, chunk, pl.ds(key_tile * TILE + i * HALF, HALF), of_values]
                plgpu.copy_gmem_to_smem(place, state_tile.at[i], state_fetched)
            pl.when(again)(lambda: plgpu.barrier_wait(used))
            for source, target, first in (
                (dout, dout_tile, value_tile),
                (v, v_tile, value_tile),
                (q, q_tile, key_tile),
                (k, k_tile, key_tile),
            ):
                for i in range(COMPUTING):
                    place = source.at[batch, tokens, head, pl.ds(first * TILE + i * HALF, HALF)]
                    plgpu.copy_gmem_to_smem(place, target.at[i], fetched)

        # A barrier may not go while somebody has still to pass it.
        for barrier in (gates_used, state_used, used):
            plgpu.barrier_wait(barrier)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        pair, late_pair = pairs.at[warpgroup], late_pairs.at[warpgroup]
        own_q, own_k = q_tile.at[warpgroup], k_tile.at[warpgroup]
        de, de_flipped = weights_tile.at[0], weights_tile.at[1]
        found = exact.at[batch, head, stretch, key_tile, value_tile, warpgroup]
        stage = stage_of(staging, warpgroup)
        product, products = partial(tile.product, staging=stage), partial(tile.products, staging=stage)
        rows, columns = tile.indices()
        square = (CHUNK, CHUNK)
        lower, below = triangles.at[0], triangles.at[1]
        # Kept in shared memory: in registers the compiler would keep them through the loop.
        pl.when(warpgroup == 0)(lambda: tile.write(lower, tile.ones_where(columns <= rows)))
        pl.when(warpgroup == 1)(lambda: tile.write(below, tile.ones_where(columns < rows)))
        plgpu.barrier_arrive(weighed)
        plgpu.barrier_wait(weighed)
        sides = [pl.ds(i * HALF, HALF) for i in range(COMPUTING)]
        own_keys = pl.ds(key_tile * TILE + warpgroup * HALF, HALF)
        own_values = pl.ds(value_tile * TILE + warpgroup * HALF, HALF)

        def add(index: int, x: jax.Array) -> None:
            """Adds to what waits in device memory."""
            found[index] = tile.load_global(found.at[index]) + x

        def find_exactly() -> None:
            """Scores and their gradients of a chunk with strong gates, level by level, into device memory."""
            level_q, level_k = late_pair.at[0], late_pair.at[1]
            for index in range(_FOUND):
                found[index] = tile.zeros(*square)

            @pl.loop(0, levels.LEVELS)
            def _level(level: jax.Array) -> None:
                reached = levels.reached(rows, columns, level)
                decays = jnp.exp(tile.summed(tile.ones_where(reached), pair, staging=stage))
                level_q[...] = (tile.load(own_q) * decays * scale).astype(jnp.bfloat16)
                level_k[...] = (tile.load(own_k) * decays).astype(jnp.bfloat16)
                plgpu.commit_smem()
                parted = levels.parted(rows, columns, level).astype(jnp.float32)
                dqs = product(square, ((tile.load(de) * parted).astype(jnp.bfloat16), level_k))
                add(0, dqs * decays * scale)
                moved = tile.load(level_q) * dqs
                parted = levels.parted(columns, rows, level).astype(jnp.float32)
                dks = product(square, ((tile.load(de_flipped) * parted).astype(jnp.bfloat16), level_q))
                add(1, dks * decays)
                moved += tile.load(level_k) * dks
                add(3, product(square, (level_k, level_q.transpose(_FLIPPED))) * parted)
                tile.write_split(late_pair, moved)
                plgpu.commit_smem()
                weights = tile.ones_where(levels.reached(columns, rows, level))
                add(2, tile.summed(weights, late_pair, staging=stage))

        def step_body(
            step: jax.Array, later: tuple[jax.Array, jax.Array], *, some_strong: bool
        ) -> tuple[jax.Array, jax.Array]:
            chunk = walk.chunk(stretch, step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            zero = hidden_zero(step)
            mine = warpgroup + zero
            own = tile.half(mine)
            pair, own_scores, other_scores = pairs.at[mine], scores.at[mine], scores.at[1 - mine]
            own_q, own_k, own_v = (ref.at[mine] for ref in (q_tile, k_tile, v_tile))
            own_state, own_leaving = state_tile.at[mine], leaving_tile.at[mine]
            late_pair, own_dgates = late_pairs.at[mine], dgates_tile.at[mine]
            ahead = columns - rows + zero
            plgpu.barrier_wait(gates_fetched)
            total = plgpu.load(vectors.at[0, own], layout=tile.ROW)
            decay = jnp.exp(total)
            # The gradients of the step before leave from there.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile.write_split(pair, jnp.maximum(tile.load(gates_tile.at[mine]), tile.WEAKEST_GATE))
            plgpu.barrier_arrive(gates_used)
            plgpu.commit_smem()
            sums = tile.summed(lower, pair, staging=stage)
            plgpu.barrier_wait(fetched)

            def weigh(left: Ref, right: Ref, target: Ref, mask: jax.Array) -> None:
                terms = ((left.at[i], right.at[i].transpose(_FLIPPED)) for i in range(COMPUTING))
                target[...] = jnp.where(mask, product(square, *terms), 0.0).astype(jnp.bfloat16)

            pl.when(warpgroup == 0)(lambda: weigh(dout_tile, v_tile, de, ahead <= 0))
            pl.when(warpgroup == 1)(lambda: weigh(v_tile, dout_tile, de_flipped, ahead >= 0))

            if some_strong:
                is_strong = strong[batch, head, chunk, key_tile * COMPUTING + warpgroup] != 0
                plgpu.commit_smem()
                plgpu.barrier_arrive(weighed)
                plgpu.barrier_wait(weighed)
                pl.when(is_strong)(find_exactly)

            def factor() -> None:
                own_q[...] = (tile.load(own_q) * (jnp.exp(sums) * scale)).astype(jnp.bfloat16)
                high, low = tile.split(tile.load(own_k) * jnp.exp(-sums))
                own_k[...] = high
                plgpu.commit_smem()
                part = product(square, *((x, own_q.transpose(_FLIPPED)) for x in (high, low)))
                own_scores[...] = jnp.where(ahead >= 0, part, 0.0)

            exponents, before, kept = -sums, decay, None
            if some_strong:
                kept = 1.0 - is_strong.astype(jnp.float32)
                # The exponents of the keys, up to the chunk's end where the chunk's beginning is too far away.
                to_end = tile.summed(below.transpose(_FLIPPED), pair, staging=stage)
                exponents = kept * exponents + (1.0 - kept) * to_end
                before = jnp.exp(total * kept)

                @pl.when(is_strong)
                def _take() -> None:
                    own_scores[...] = tile.load_global(found.at[3])
                    own_q[...] = (tile.load(own_q) * (jnp.exp(sums) * scale)).astype(jnp.bfloat16)
                    own_k[...] = (tile.load(own_k) * jnp.exp(exponents)).astype(jnp.bfloat16)

                pl.when(jnp.logical_not(is_strong))(factor)
            else:
                factor()

            def within(side: Ref) -> jax.Array | Ref:
                """What weighs keys and queries of the chunk itself; none where the levels have done so."""
                return side if kept is None else (tile.load(side) * kept).astype(jnp.bfloat16)

            def with_found(index: int, x: jax.Array) -> jax.Array:
                def taken(x: jax.Array) -> jax.Array:
                    return x + tile.load_global(found.at[index])

                return x if kept is None else lax.cond(is_strong, taken, lambda x: x, x)

            for side, half in zip(sides, later, strict=True):
                own_leaving[:, side] = (half * tile.along_rows(before, HALF)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(prepared)
            plgpu.barrier_wait(state_fetched)
            crossing = sum(
                jnp.sum(tile.load(own_state.at[:, side]) * half, axis=1)
                for side, half in zip(sides, later, strict=True)
            )
            vectors[1, own] = crossing * decay
            plgpu.barrier_wait(prepared)

            scored = tile.split(tile.load(own_scores) + tile.load(other_scores))
            # One after the other: together with what else is kept they would not fit in the registers.
            dv_own = product(
                square,
                *((part, dout_tile.at[mine]) for part in scored),
                *((k_tile.at[i], leaving_tile.at[i, :, own]) for i in range(COMPUTING)),
            ).astype(jnp.bfloat16)
            dk_state = product(
                square, *((v_tile.at[i], own_leaving.at[:, sides[i]].transpose(_FLIPPED)) for i in range(COMPUTING))
            )
            plgpu.barrier_arrive(shared_read)
            plgpu.barrier_wait(shared_read)
            own_v[...] = dv_own
            tile.write_split(pair, tile.load(own_k) * dk_state)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_v, dv.at[key_tile, batch, tokens, head, own_values])

            dk_own = product(square, (within(de_flipped), own_q))
            moved = -tile.load(own_k) * dk_own
            dk_own = with_found(1, (dk_own + dk_state) * jnp.exp(exponents)).astype(jnp.bfloat16)
            terms = [(dout_tile.at[i], own_state.at[:, sides[i]].transpose(_FLIPPED)) for i in range(COMPUTING)]
            dq_own = product(square, *terms, (within(de), own_k))
            plgpu.barrier_arrive(state_used)
            tile.write_split(late_pair, moved + tile.load(own_q) * dq_own)
            dq_own = with_found(0, dq_own * jnp.exp(sums) * scale).astype(jnp.bfloat16)
            plgpu.commit_smem()
            dgate = product(
                square,
                *((lower.transpose(_FLIPPED), late_pair.at[i]) for i in range(2)),
                *((below, pair.at[i]) for i in range(2)),
            )
            dgate += tile.along_columns(plgpu.load(vectors.at[1, own], layout=tile.COLUMN), CHUNK)
            own_dgates[...] = with_found(2, dgate)
            new = products(*((square, [(own_q.transpose(_FLIPPED), dout_tile.at[i])]) for i in range(COMPUTING)))
            # Only the values' gradients were stored from a tile that is fetched again, long ago.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(used)
            pair[0], pair[1] = dq_own, dk_own
            plgpu.commit_smem()
            for source, target in ((pair.at[0], dq), (pair.at[1], dk), (own_dgates, dgates)):
                plgpu.copy_smem_to_gmem(source, target.at[value_tile, batch, tokens, head, own_keys])
            return tuple(half * tile.along_rows(decay, HALF) + x for half, x in zip(later, new, strict=True))

        def walk_through(*, some_strong: bool) -> None:
            places = [pl.ds(value_tile * TILE + i * HALF, HALF) for i in range(COMPUTING)]
            later = tuple(tile.load_global(leaving.at[batch, head, stretch, own_keys, place]) for place in places)
            lax.fori_loop(0, steps + nothing[0], partial(step_body, some_strong=some_strong), later)

        # A loop of its own for what most stretches are: it needs fewer registers than there are.
        is_any_strong = some_strong[batch, head, stretch, key_tile] != 0
        pl.when(is_any_strong)(partial(walk_through, some_strong=True))
        pl.when(jnp.logical_not(is_any_strong))(partial(walk_through, some_strong=False))
        plgpu.wait_smem_to_gmem(0)
