"""Kernel: outputs, for a decay per key channel."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.launch import (
    COMPUTING_REGISTERS,
    PRODUCER_REGISTERS,
    bfloat16,
    float32,
    hidden_zero,
    launch,
    left_state,
    stage_of,
)
from zeco_jax.attention.hopper.passes import Passes
from zeco_jax.attention.hopper.runs import walk_runs
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, FACTORED_LIMIT, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

# Chunks in flight, and tokens whose gates are loaded together to be summed.
_SLOTS = 2
_TOKENS = 8


def replay_channel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    entering: jax.Array,
    *,
    walk: Walk,
    scale: float,
    keep_states: bool = False,
    paired: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    r"""The outputs of every token, with a state of one tile.

    .. math:: o_i = \text{scale} \Big((q_i \odot e^{b_i}) S + \sum_{j \le i} (q_i \odot e^{b_i - b_j}) k_j^\top v_j\Big)

    with :math:`b` the gates' sums since the chunk began and S the state that enters the chunk.

    Args:
        q: [B, T, H, TILE] bfloat16, T a multiple of CHUNK.
        k: [B, T, H, TILE] bfloat16.
        v: [B, T, H, TILE] bfloat16.
        gates: [B, T, H, TILE] float32.
        entering: [B, H, stretches, TILE, TILE] float32, the state that enters each stretch; of paired heads all states
            are [B, 2 H, *, HALF, HALF].
        walk: the stretches, forward.
        scale: factor on the outputs.
        keep_states: return the chunks' states, too.
        paired: see `tile.own_head`.
        interpret: simulate the kernel.

    Returns:
        Outputs [B, T, H, TILE] bfloat16; of a closed walk the state it ends with, [B, H, TILE, TILE] float32; and if
        asked for the state that enters each chunk, [B, H, chunks, TILE, TILE] bfloat16.
    """
    batch, _, heads, _ = q.shape
    of_states, *state = tile.state_shape(heads, paired=paired)
    states = (bfloat16(batch, of_states, walk.chunks, *state),) if keep_states else ()
    out, _, *others = launch(
        partial(_replay, walk=walk, scale=scale, paired=paired),
        (q, k, v, gates, entering),
        (
            bfloat16(*v.shape),
            float32(batch, of_states, walk.stretches, *state),
            *left_state(walk, batch, of_states, *state),
            *states,
        ),
        {
            "q_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
            "k_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
            "v_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
            "gates_tile": tile.fp32_tile(CHUNK, TILE),
            # The gates' sums over a chunk, and the least of them in each half of the channels.
            "totals": plgpu.SMEM((_SLOTS, TILE), jnp.float32),
            "least": plgpu.SMEM((_SLOTS, COMPUTING), jnp.float32),
            # Scores take the place of the gates, once these are summed.
            "work": plgpu.RefUnion(tile.bf16_tile(COMPUTING, 2, CHUNK, HALF), tile.fp32_tile(COMPUTING, CHUNK, CHUNK)),
            # Decays of the state; before, what `Passes` keeps.
            "factors": plgpu.SMEM((2, TILE), jnp.float32),
            "state_tile": tile.bf16_tile(COMPUTING, state[0], HALF),
            "out_tile": tile.bf16_tile(COMPUTING, CHUNK, HALF),
            # Ones up to and including the diagonal.
            "triangle": tile.bf16_tile(CHUNK, CHUNK),
            "fetched": plgpu.Barrier(num_arrivals=3, num_barriers=_SLOTS),
            "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
            "gates_fetched": plgpu.Barrier(),
            "gates_used": plgpu.Barrier(num_arrivals=COMPUTING),
            "summed": plgpu.Barrier(),
            "prepared": plgpu.Barrier(num_arrivals=COMPUTING),
            "scores_read": plgpu.Barrier(num_arrivals=COMPUTING),
        },
        name="replay_channel",
        stretches=walk.stretches,
        state=(batch, heads, TILE, TILE),
        interpret=interpret,
    )
    return out, *others


def _replay(
    q: Ref,
    k: Ref,
    v: Ref,
    gates: Ref,
    entering: Ref,
    nothing: Ref,
    out: Ref,
    parked: Ref,
    *others: Ref,
    walk: Walk,
    scale: float,
    paired: bool,
    q_tile: Ref,
    k_tile: Ref,
    v_tile: Ref,
    gates_tile: Ref,
    totals: Ref,
    least: Ref,
    work: Ref,
    factors: Ref,
    state_tile: Ref,
    out_tile: Ref,
    triangle: Ref,
    fetched: Ref,
    used: Ref,
    gates_fetched: Ref,
    gates_used: Ref,
    summed: Ref,
    prepared: Ref,
    scores_read: Ref,
    staging: Ref | None,
) -> None:
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    warpgroup = lax.axis_index("warpgroup")
    left, states = others[: walk.closed], others[walk.closed :]
    steps = walk.steps(stretch)
    pairs, scores = work

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        @pl.loop(0, steps)
        def _step(step: jax.Array) -> None:
            slot = lax.rem(step, _SLOTS)
            chunk = walk.chunk(stretch, step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            pl.when(step >= _SLOTS)(lambda: plgpu.barrier_wait(used.at[slot]))
            full = fetched.at[slot]
            plgpu.copy_gmem_to_smem(q.at[batch, tokens, head], q_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(k.at[batch, tokens, head], k_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(v.at[batch, tokens, head], v_tile.at[slot], full)
            pl.when(step >= 1)(lambda: plgpu.barrier_wait(gates_used))
            plgpu.copy_gmem_to_smem(gates.at[batch, tokens, head], gates_tile, gates_fetched)
            # Summed here, while the others are at the chunk before: they must know which loop is for this one.
            plgpu.barrier_wait(gates_fetched)
            sums = [_sum_of_tokens(gates_tile.at[:, tile.half(half)]) for half in range(COMPUTING)]
            for half, total in enumerate(sums):
                totals[slot, tile.half(half)] = total
                least[slot, half] = jnp.min(total)
            plgpu.commit_smem()
            plgpu.barrier_arrive(summed)

        # A barrier may not go while somebody has still to pass it.
        plgpu.barrier_wait(gates_used)
        # At their last step the others ask once more.
        plgpu.barrier_arrive(summed)

        @pl.loop(jnp.maximum(steps - _SLOTS, 0), steps)
        def _drain(step: jax.Array) -> None:
            plgpu.barrier_wait(used.at[lax.rem(step, _SLOTS)])

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        stage = stage_of(staging, warpgroup)
        rows, columns = tile.indices()
        # Both warpgroups write the same.
        tile.write(triangle, tile.ones_where(columns <= rows))
        own_values = tile.half(warpgroup)
        of_states = tile.own_head(head, warpgroup, paired=paired)
        columns_of_states = tile.in_state(own_values, paired=paired)

        def is_strong(step: jax.Array) -> jax.Array:
            """Waits for the sums of this step's gates."""
            plgpu.barrier_wait(summed)
            slot = lax.rem(step, _SLOTS)
            return jnp.minimum(least[slot, 0], least[slot, 1]) < FACTORED_LIMIT

        def step_body(step: jax.Array, state: jax.Array, *, some_strong: bool) -> tuple[jax.Array, jax.Array]:
            slot = lax.rem(step, _SLOTS)
            chunk = walk.chunk(stretch, step)
            zero = hidden_zero(step)
            mine = warpgroup + zero
            own = tile.half(mine)
            pair, own_scores, other_scores = pairs.at[mine], scores.at[mine], scores.at[1 - mine]
            own_out = out_tile.at[mine]
            plgpu.barrier_wait(gates_fetched)
            gate = jnp.maximum(tile.load(gates_tile.at[:, own]), tile.WEAKEST_GATE)
            plgpu.barrier_arrive(gates_used)
            if not paired:
                pl.when(step >= 1)(lambda: plgpu.barrier_wait(scores_read))
            tile.write_split(pair, gate)
            plgpu.commit_smem()
            sums = tile.summed(triangle, pair, staging=stage)
            plgpu.barrier_wait(fetched.at[slot])
            q_own, k_own = q_tile.at[slot, :, own], k_tile.at[slot, :, own]
            total = plgpu.load(totals.at[slot, own], layout=tile.COLUMN)
            decay = jnp.exp(total)

            def factored() -> jax.Array:
                high, low = tile.split(tile.load(q_own) * tile.scaled_exp(sums, scale), rounded=True)
                q_own[...] = high
                k_own[...] = (tile.load(k_own) * jnp.exp(-sums)).astype(jnp.bfloat16)
                factors[1, own] = decay
                plgpu.commit_smem()
                terms = [(part, k_own.transpose((1, 0))) for part in (high, low)]
                return tile.product((CHUNK, CHUNK), *terms, staging=stage)

            def factored_beside_exact() -> None:
                own_scores[...] = factored()
                factors[0, own] = tile.ones(HALF)

            def exact() -> None:
                over = Passes.of(pair, factors.at[0, own], staging=stage)

                def pass_body(which: jax.Array, part: jax.Array) -> jax.Array:
                    # No warp may still be reading what is about to be written.
                    plgpu.commit_smem()
                    of_queries, of_keys = over.decays(which, pair, staging=stage)
                    own_out[...] = (tile.load(k_own) * of_keys).astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    terms = ((tile.load(q_own) * of_queries * scale).astype(jnp.bfloat16), own_out.transpose((1, 0)))
                    scored = tile.product((CHUNK, CHUNK), terms, staging=stage)
                    return part + jnp.where(over.parted(which), scored, 0.0)

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                part = lax.fori_loop(over.first, over.end, pass_body, tile.zeros(CHUNK, CHUNK))
                later = tile.summed(tile.ones_where(columns - rows + zero > 0), pair, staging=stage)
                plgpu.commit_smem()
                own_scores[...] = part
                q_own[...] = (tile.load(q_own) * tile.scaled_exp(sums, scale)).astype(jnp.bfloat16)
                k_own[...] = (tile.load(k_own) * jnp.exp(later)).astype(jnp.bfloat16)
                factors[0, own] = decay
                factors[1, own] = tile.ones(HALF)

            if some_strong:
                own_strong = least[slot, warpgroup] < FACTORED_LIMIT
                pl.when(own_strong)(exact)
                pl.when(jnp.logical_not(own_strong))(factored_beside_exact)
            else:
                scored = factored()
                if not paired:
                    own_scores[...] = scored
            own_state = state_tile.at[mine]
            if states:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own_state[...] = state.astype(jnp.bfloat16)
            plgpu.commit_smem()
            for target in states:
                plgpu.copy_smem_to_gmem(own_state, target.at[batch, of_states, chunk, :, columns_of_states])
            if not paired:
                plgpu.barrier_arrive(prepared)
                plgpu.barrier_wait(prepared)
            if some_strong:
                scored = tile.load(own_scores)
            if paired:
                q_part, k_part, factor = q_own, k_own, factors.at[:, own]
            else:
                q_part, k_part, factor = q_tile.at[slot], k_tile.at[slot], factors
                scored += tile.load(other_scores)
            if some_strong:
                state *= tile.along_rows(plgpu.load(factor.at[0], layout=tile.ROW), HALF)
            after = plgpu.load(factor.at[1], layout=tile.ROW)
            if not paired:
                plgpu.barrier_arrive(scores_read)
            # Numbers, not conditions: a mask for each place would take 32 registers all along. What it takes away is
            # at most e^50 times larger than what stays.
            up_to = plgpu.load(triangle, layout=tile.WGMMA)
            scored, v_own = [part * up_to for part in tile.split(scored)], v_tile.at[slot, :, own]
            result, state = tile.added_products(
                (tile.zeros(CHUNK, HALF), [(q_part, own_state), *((part, v_own) for part in scored)]),
                (state, [(k_part.transpose((1, 0)), v_own)]),
                staging=stage,
            )
            plgpu.barrier_arrive(used.at[slot])
            state *= tile.along_rows(after, HALF)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own_out[...] = result.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_out, out.at[batch, tokens, head, own_values])
            return is_strong(step + 1), state

        own_parked = parked.at[batch, of_states, stretch, :, columns_of_states]

        def park(state: jax.Array) -> None:
            own_parked[...] = state
            # Read back by other threads of the warpgroup.
            plgpu.commit_smem()

        def last(state: jax.Array) -> None:
            @pl.when(walk.closes(stretch))
            def _close() -> None:
                left[0][batch, of_states, :, columns_of_states] = state

        walk_runs(
            steps + nothing[0],
            is_strong(jnp.int32(0)),
            step_body,
            lambda: tile.load_global(entering.at[batch, of_states, stretch, :, columns_of_states]),
            last,
            park,
            lambda: tile.load_global(own_parked),
        )
        if not paired:
            plgpu.barrier_wait(scores_read)
        plgpu.wait_smem_to_gmem(0)


def _sum_of_tokens(gates: Ref) -> jax.Array:
    """The sums over tokens [HALF] of a chunk's gates [CHUNK, HALF].

    Laid out so that all tokens of a channel are in one warp, for the few registers of who fetches. Not cut off at
    WEAKEST_GATE: exponential and comparison with the limit come out the same.
    """
    parts = []
    for start in range(0, CHUNK, _TOKENS):
        part = gates.at[pl.ds(start, _TOKENS)].transpose((1, 0))
        parts.append(plgpu.load(part, layout=plgpu.Layout.WGMMA_TRANSPOSED))
    return jnp.sum(sum(parts[1:], start=parts[0]), axis=1)
