"""Kernel: every gradient, for one decay per token and head and a state of one tile."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.decays import Decays, fetch_sums, tokens_at, write_positions
from zeco_jax.attention.hopper.fetching import fetch_chunks
from zeco_jax.attention.hopper.launch import (
    COMPUTING_REGISTERS,
    bfloat16,
    float32,
    hidden_zero,
    launch,
    left_state,
    stage_of,
)
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

_SLOTS = 2
_FLIPPED = (1, 0)


def gradients_scalar(
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
    paired: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    r"""The gradients of queries, keys and values, and what the gates' come from, with a state of one tile.

    With b the gates' sums since the chunk began, S the state that enters the chunk, D the cotangent of the state that
    leaves it, :math:`P_{ij} = \text{scale}\; e^{b_i - b_j} q_i \cdot k_j` and
    :math:`E_{ij} = \text{scale}\; e^{b_i - b_j} do_i \cdot v_j` for :math:`j \le i`:

    .. math::
        dq_i &= \text{scale}\; e^{b_i} S do_i + \sum_j E_{ij} k_j \\
        dk_j &= e^{b_C - b_j} D v_j + \sum_i E_{ij} q_i \\
        dv_j &= e^{b_C - b_j} D^\top k_j + \sum_i P_{ij} do_i

    For the gates, with the first term of dq called dq', that of dk dk':

    .. math::
        z_t = \sum_{j < t \le i} P_{ij} (do_i \cdot v_j), \quad
        u_t = q_t \cdot dq'_t, \quad w_t = k_t \cdot dk'_t, \quad x_k = e^{b_C} \sum_v S_{kv} D_{kv}

    Args:
        q: [B, T, H, TILE] bfloat16, T a multiple of CHUNK.
        k: [B, T, H, TILE] bfloat16.
        v: [B, T, H, TILE] bfloat16.
        sums: [B or 1, H, T] float32, the gates' sums since each chunk began.
        dout: [B, T, H, TILE] bfloat16.
        states: [B, H, chunks, TILE, TILE] bfloat16, the state that enters each chunk.
        leaving: [B, H, stretches, TILE, TILE] float32, the cotangent of the state that leaves each stretch.
        walk: the stretches, in reverse.
        scale: factor on the outputs.
        paired: see `tile.own_head`; sums and states are those of 2 H heads, of the gates' parts there is one for each.
        interpret: simulate the kernel.

    Returns:
        dq, dk and dv [B, T, H, TILE] bfloat16; z, u and w [COMPUTING, B, H, T] and x [COMPUTING, B, H, chunks, HALF]
        float32 for `gate_gradient`; and of a closed walk the cotangent it ends with, [B, H, TILE, TILE] float32.
    """
    batch, tokens, heads, _ = q.shape
    halves = tile.bf16_tile(COMPUTING, CHUNK, HALF)
    chunk_tile = tile.bf16_tile(_SLOTS, CHUNK, TILE)
    of_states, *state = tile.state_shape(heads, paired=paired)
    count = tile.heads_per_tile(paired=paired)
    return launch(
        partial(_gradients, walk=walk, scale=scale, paired=paired),
        (q, k, v, sums, dout, states, leaving),
        (
            bfloat16(*q.shape),
            bfloat16(*k.shape),
            bfloat16(*v.shape),
            *gate_parts(COMPUTING // count, batch, of_states, tokens),
            *left_state(walk, batch, of_states, *state),
        ),
        {
            "q_tile": chunk_tile,
            "k_tile": chunk_tile,
            "v_tile": chunk_tile,
            "dout_tile": chunk_tile,
            # The last place is for the positions.
            "sums_tile": plgpu.SMEM((_SLOTS + 1, count, CHUNK), jnp.float32),
            "state_tile": tile.bf16_tile(count, *state),
            "leaving_tile": tile.bf16_tile(COMPUTING, state[0], HALF),
            # What a warpgroup is about to multiply or to store; a store may still read the one while the other fills.
            "first_work": halves,
            "second_work": tile.bf16_tile(count, COMPUTING, CHUNK, HALF),
            "fetched": plgpu.Barrier(num_arrivals=4 + count, num_barriers=_SLOTS),
            "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
            "state_fetched": plgpu.Barrier(num_arrivals=count),
            "state_used": plgpu.Barrier(num_arrivals=COMPUTING),
            "leaving_written": plgpu.Barrier(num_arrivals=COMPUTING),
            "leaving_read": plgpu.Barrier(num_arrivals=COMPUTING),
        },
        name="gradients_scalar",
        stretches=walk.stretches,
        state=(batch, heads, TILE, TILE),
        interpret=interpret,
    )


def gate_parts(parts: int, batch: int, heads: int, tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The outputs z, u, w and x of a kernel, for `gate_gradient`."""
    by_token = float32(parts, batch, heads, tokens)
    return by_token, by_token, by_token, float32(parts, batch, heads, tokens // CHUNK, HALF)


def gate_gradient(z: jax.Array, u: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
    r"""The gates' gradients, from what its kernels return in parts that are to be summed.

    .. math:: dg_t = z_t + \sum_{s \ge t} u_s + \sum_{s < t} w_s + \sum_k x_k

    over the tokens s of the chunk of t. Nothing is subtracted, so that strong decays leave their small gradients exact.

    Args:
        z: [parts, B, H, T], what pairs of tokens of the chunk give.
        u: [parts, B, H, T], queries and the state that enters.
        w: [parts, B, H, T], keys and the cotangent of the state that leaves.
        x: [parts, B, H, chunks, *], the two states.

    Returns:
        [B, T, H, 1] float32.
    """
    by_chunk = (*z.shape[1:3], -1, CHUNK)
    z, u, w = (jnp.sum(part, axis=0).reshape(by_chunk) for part in (z, u, w))
    earlier = jnp.pad(w, ((0, 0), (0, 0), (0, 0), (1, 0)))[..., :-1]
    through = jnp.sum(x, axis=(0, 4))[..., None]
    gradient = z + lax.cumsum(u, axis=3, reverse=True) + lax.cumsum(earlier, axis=3) + through
    return jnp.moveaxis(gradient.reshape(*by_chunk[:2], -1), 1, 2)[..., None]


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
    dv: Ref,
    z: Ref,
    u: Ref,
    w: Ref,
    x: Ref,
    *left: Ref,
    walk: Walk,
    scale: float,
    paired: bool,
    q_tile: Ref,
    k_tile: Ref,
    v_tile: Ref,
    dout_tile: Ref,
    sums_tile: Ref,
    state_tile: Ref,
    leaving_tile: Ref,
    first_work: Ref,
    second_work: Ref,
    fetched: Ref,
    used: Ref,
    state_fetched: Ref,
    state_used: Ref,
    leaving_written: Ref,
    leaving_read: Ref,
    staging: Ref | None,
) -> None:
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        def fetch(chunk: jax.Array, tokens: pl.Slice, slot: jax.Array) -> None:
            full = fetched.at[slot]
            fetch_sums(sums, batch, head, tokens, sums_tile.at[slot], full, paired=paired)
            for source, target in ((dout, dout_tile), (q, q_tile), (v, v_tile), (k, k_tile)):
                plgpu.copy_gmem_to_smem(source.at[batch, tokens, head], target.at[slot], full)
            plgpu.barrier_wait(state_used)
            for index, of_states in enumerate(tile.heads_of(head, paired=paired)):
                plgpu.copy_gmem_to_smem(states.at[batch, of_states, chunk], state_tile.at[index], state_fetched)

        fetch_chunks(walk, stretch, fetch, used=used, slots=_SLOTS)
        plgpu.barrier_wait(state_used)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        stage = stage_of(staging, warpgroup)
        zeros, added = partial(tile.zeros, CHUNK, CHUNK), partial(tile.added_products, staging=stage)
        own_channels = tile.half(warpgroup)
        # The keys of the states by halves; a paired head has one.
        sides = [pl.ds(index * HALF, HALF) for index in range(1 if paired else COMPUTING)]
        of_states = tile.own_head(head, warpgroup, paired=paired)
        columns = tile.in_state(own_channels, paired=paired)

        def products(*jobs: list[tile.Factors]) -> tuple[jax.Array, ...]:
            return tile.products(*(((CHUNK, CHUNK), terms) for terms in jobs), staging=stage)

        positions = sums_tile.at[_SLOTS, 0]
        # Both warpgroups write the same.
        write_positions(positions)

        # The first state finds its place free.
        plgpu.barrier_arrive(state_used)

        def step_body(step: jax.Array, later: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            zero = hidden_zero(step)
            mine = warpgroup + zero
            own = tile.half(mine)
            first, own_leaving = first_work.at[mine], leaving_tile.at[mine]
            part = (0, batch, of_states) if paired else (mine, batch, head)
            slot = lax.rem(step, _SLOTS)
            chunk = walk.chunk(stretch, step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            queries, keys, values, douts = (ref.at[slot] for ref in (q_tile, k_tile, v_tile, dout_tile))
            decays = Decays(sums_tile.at[slot, mine if paired else 0], positions)
            # All channels that are summed over.
            if paired:
                queries, keys, values, douts = (ref.at[:, own] for ref in (queries, keys, values, douts))
                state, seconds = state_tile.at[mine], [second_work.at[mine, i] for i in range(COMPUTING)]
                own = pl.ds(0, HALF)
            else:
                state, seconds = state_tile.at[zero], [second_work.at[zero, mine]]
            second = seconds[0]
            plgpu.barrier_wait(fetched.at[slot])
            before = tile.along_rows(decays.before() * scale, HALF)
            pl.when(step >= 1)(lambda: plgpu.barrier_wait(leaving_read))
            for side, rest in zip(sides, later, strict=True):
                own_leaving[side] = rest.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(leaving_written)
            plgpu.barrier_wait(state_fetched)
            whole = decays.whole()
            # The diagonal of a product is cheaper than products of numbers, which would have to be read first.
            crossing, dq_own, weights = products(
                [(state.at[side, own], own_leaving.at[side].transpose(_FLIPPED)) for side in sides],
                [(douts, state.at[own].transpose(_FLIPPED))],
                [(douts, values.transpose(_FLIPPED))],
            )
            plgpu.barrier_arrive(state_used)
            row, column = tokens_at(positions)
            x[*part, chunk] = jnp.sum(jnp.where(row == column, crossing, 0.0), axis=1) * whole
            dq_own *= before
            u[*part, tokens] = jnp.sum(tile.load(queries.at[:, own]) * dq_own, axis=1)
            weights = (weights * (decays.between() * scale)).astype(jnp.bfloat16)
            dq_own, scores, weights = added(
                (dq_own, [(weights, keys.at[:, own])]),
                (zeros(), [(keys, queries.transpose(_FLIPPED))]),
                (zeros(), [(values, douts.transpose(_FLIPPED))]),
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile.write(first, dq_own.astype(jnp.bfloat16))
            plgpu.copy_smem_to_gmem(first, dq.at[batch, tokens, head, own_channels])

            between = decays.between(transposed=True) * scale
            scores *= between
            moved = scores * weights
            scores, weights = tile.split(scores), (weights * between).astype(jnp.bfloat16)
            if paired:
                for part_of_moved, target in zip(tile.split(moved), seconds, strict=True):
                    tile.write(target, part_of_moved)
            else:
                # A warpgroup sums one of the two parts.
                for index in range(COMPUTING):
                    pl.when(warpgroup == index)(lambda index=index: tile.write(second, tile.split(moved)[index]))
            row, column = tokens_at(positions)
            earlier = tile.ones_where(column < row)
            crossing, dv_own = products([(earlier, x) for x in seconds], [(keys, own_leaving)])
            row, column = tokens_at(positions)
            z[*part, tokens] = jnp.sum(jnp.where(column >= row, crossing, 0.0), axis=1)

            after = tile.along_rows(decays.after(), HALF)
            plgpu.barrier_wait(leaving_written)
            # Pallas's `run_state` takes no constants as indices.
            halves = [mine] if paired else [index + zero for index in range(COMPUTING)]
            leaving_of_sides = [leaving_tile.at[index, own].transpose(_FLIPPED) for index in halves]
            dv_own, dk_own = added(
                (dv_own * after, [(term, douts.at[:, own]) for term in scores]),
                (zeros(), [(values.at[:, side], term) for side, term in zip(sides, leaving_of_sides, strict=True)]),
            )
            plgpu.barrier_arrive(leaving_read)
            # Every warp is done with its products, here and below.
            plgpu.commit_smem()
            tile.write(second, dv_own.astype(jnp.bfloat16))
            plgpu.copy_smem_to_gmem(second, dv.at[batch, tokens, head, own_channels])

            dk_own *= after
            w[*part, tokens] = jnp.sum(tile.load(keys.at[:, own]) * dk_own, axis=1)
            # The gradient of the queries has left the first work.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            tile.write(first, (tile.load(douts.at[:, own]) * before).astype(jnp.bfloat16))
            jobs = (
                (rest * whole, [(queries.at[:, side].transpose(_FLIPPED), first)])
                for side, rest in zip(sides, later, strict=True)
            )
            dk_own, *later = added((dk_own, [(weights, queries.at[:, own])]), *jobs)
            plgpu.barrier_arrive(used.at[slot])
            plgpu.commit_smem()
            tile.write(first, dk_own.astype(jnp.bfloat16))
            plgpu.copy_smem_to_gmem(first, dk.at[batch, tokens, head, own_channels])
            return tuple(later)

        later = tuple(tile.load_global(leaving.at[batch, of_states, stretch, side, columns]) for side in sides)
        later = lax.fori_loop(0, walk.steps(stretch) + nothing[0], step_body, later)

        @pl.when(walk.closes(stretch))
        def _leave() -> None:
            for side, rest in zip(sides, later, strict=True):
                left[0][batch, of_states, side, columns] = rest

        plgpu.barrier_wait(leaving_read)
        plgpu.wait_smem_to_gmem(0)
