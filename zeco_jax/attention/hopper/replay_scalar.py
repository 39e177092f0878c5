"""Kernel: outputs, or in reverse the gradients of the values, for one decay per token and head."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.decays import Decays, fetch_sums, write_positions
from zeco_jax.attention.hopper.fetching import fetch_chunks
from zeco_jax.attention.hopper.launch import COMPUTING_REGISTERS, bfloat16, hidden_zero, launch, left_state, stage_of
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

_SLOTS = 2


def replay_scalar(
    q: jax.Array,
    k: jax.Array,
    values: jax.Array,
    sums: jax.Array,
    entering: jax.Array,
    *,
    walk: Walk,
    scale: float,
    keep_states: bool = False,
    paired: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    r"""The outputs of every token; a block of threads holds the states of all key channels for a tile of the values.

    .. math::
        o_i = \text{scale} \Big(e^{b_i} q_i S + \sum_{j \le i} e^{b_i - b_j} (q_i k_j^\top) v_j\Big), \qquad
        S \leftarrow e^{b_C} S + \sum_j e^{b_C - b_j} k_j v_j^\top

    with :math:`b` the gates' sums since the chunk began and S the state that enters the chunk. In reverse the gradients
    of the values from the cotangents of the outputs, with D the cotangent of the state that leaves the chunk:

    .. math::
        dv_j = e^{b_C - b_j} k_j D + \text{scale} \sum_{i \ge j} e^{b_i - b_j} (k_j q_i^\top) do_i, \qquad
        D \leftarrow e^{b_C} D + \text{scale} \sum_i e^{b_i} q_i do_i^\top

    Args:
        q: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE, at most two of them.
        k: [B, T, H, K] bfloat16.
        values: [B, T, H, V] bfloat16, V a multiple of TILE; in reverse the outputs' cotangents.
        sums: [B or 1, H, T] float32, the gates' sums since each chunk began.
        entering: [B, H, stretches, K, V] float32, the state that enters each stretch; in reverse the cotangent of the
            one that leaves it.
        walk: the stretches.
        scale: factor on the outputs.
        keep_states: return the chunks' states, too.
        paired: see `tile.own_head`; sums and states are those of 2 H heads.
        interpret: simulate the kernel.

    Returns:
        [B, T, H, V] bfloat16; of a closed walk the state it ends with, [B, H, K, V] float32; and if asked for the
        state that enters each chunk, in reverse the cotangent of the one that leaves it, [B, H, chunks, K, V] bfloat16.
    """
    batch, _, heads, width = values.shape
    key_width = q.shape[-1]
    queries, keys = (k, q) if walk.reverse else (q, k)
    _, of_states, _, *state = entering.shape
    states = (bfloat16(batch, of_states, walk.chunks, *state),) if keep_states else ()
    count = tile.heads_per_tile(paired=paired)
    return launch(
        partial(_replay, walk=walk, scale=scale, paired=paired),
        (queries, keys, values, sums, entering),
        (bfloat16(*values.shape), *left_state(walk, batch, of_states, *state), *states),
        {
            "q_tile": tile.bf16_tile(_SLOTS, CHUNK, key_width),
            "k_tile": tile.bf16_tile(_SLOTS, CHUNK, key_width),
            "v_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
            # The last place is for the positions.
            "sums_tile": plgpu.SMEM((_SLOTS + 1, count, CHUNK), jnp.float32),
            # Of the values, as the state takes them; the scores take them undecayed.
            "decayed_tile": tile.bf16_tile(COMPUTING, CHUNK, HALF),
            "state_tile": tile.bf16_tile(COMPUTING, HALF if paired else TILE, HALF),
            "out_tile": tile.bf16_tile(COMPUTING, CHUNK, HALF),
            "fetched": plgpu.Barrier(num_arrivals=3 + count, num_barriers=_SLOTS),
            "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
        },
        name="replay_scalar_reverse" if walk.reverse else "replay_scalar",
        stretches=walk.stretches,
        state=(batch, heads, TILE, width),
        interpret=interpret,
    )


def _replay(
    queries: Ref,
    keys: Ref,
    values: Ref,
    sums: Ref,
    entering: Ref,
    nothing: Ref,
    out: Ref,
    *others: Ref,
    walk: Walk,
    scale: float,
    paired: bool,
    q_tile: Ref,
    k_tile: Ref,
    v_tile: Ref,
    sums_tile: Ref,
    decayed_tile: Ref,
    state_tile: Ref,
    out_tile: Ref,
    fetched: Ref,
    used: Ref,
    staging: Ref | None,
) -> None:
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    value_tile, warpgroup = lax.axis_index("value_tile"), lax.axis_index("warpgroup")
    left, kept = others[: walk.closed], others[walk.closed :]
    # Of the states; a paired head's own.
    all_keys = [pl.ds(0, HALF)] if paired else [pl.ds(first, TILE) for first in range(0, queries.shape[-1], TILE)]

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        def fetch(chunk: jax.Array, tokens: pl.Slice, slot: jax.Array) -> None:
            del chunk
            full, of_values = fetched.at[slot], pl.ds(value_tile * TILE, TILE)
            plgpu.copy_gmem_to_smem(queries.at[batch, tokens, head], q_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(keys.at[batch, tokens, head], k_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(values.at[batch, tokens, head, of_values], v_tile.at[slot], full)
            fetch_sums(sums, batch, head, tokens, sums_tile.at[slot], full, paired=paired)

        fetch_chunks(walk, stretch, fetch, used=used, slots=_SLOTS)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        stage = stage_of(staging, warpgroup)
        own_values = pl.ds(value_tile * TILE + warpgroup * HALF, HALF)
        of_states = tile.own_head(head, warpgroup, paired=paired)
        columns = tile.in_state(own_values, paired=paired)
        positions = sums_tile.at[_SLOTS, 0]
        # Both warpgroups write the same.
        write_positions(positions)

        def step_body(step: jax.Array, states: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slot = lax.rem(step, _SLOTS)
            chunk = walk.chunk(stretch, step)
            mine = warpgroup + hidden_zero(step)
            own_decayed, own_state, own_out = (x.at[mine] for x in (decayed_tile, state_tile, out_tile))
            v_own = v_tile.at[slot, :, tile.half(mine)]
            decays = Decays(sums_tile.at[slot, mine if paired else 0], positions)

            def decay(*, to_end: bool) -> jax.Array:
                return tile.along_rows(decays.after() if to_end else decays.before() * scale, HALF)

            scored, result, next_states = tile.zeros(CHUNK, CHUNK), tile.zeros(CHUNK, HALF), []
            for of_keys, state in zip(all_keys, states, strict=True):
                if kept:
                    # The state before; behind the last one of a chunk went the outputs, which may be under way.
                    plgpu.wait_smem_to_gmem(0 if next_states else 1, wait_read_only=True)
                elif next_states:
                    # Every warp is done with its products.
                    plgpu.commit_smem()
                own_state[...] = state.astype(jnp.bfloat16)
                if not next_states:
                    plgpu.barrier_wait(fetched.at[slot])
                    own_decayed[...] = (tile.load(v_own) * decay(to_end=not walk.reverse)).astype(jnp.bfloat16)
                plgpu.commit_smem()
                for target in kept:
                    plgpu.copy_smem_to_gmem(own_state, target.at[batch, of_states, chunk, of_keys, columns])
                q_part, k_part = (x.at[slot, :, tile.half(mine) if paired else of_keys] for x in (q_tile, k_tile))
                k_part = k_part.transpose((1, 0))
                scored, result, state = tile.added_products(
                    (scored, [(q_part, k_part)]),
                    (result, [(q_part, own_state)]),
                    (state * decays.whole(), [(k_part, own_decayed)]),
                    staging=stage,
                )
                next_states.append(state)
            result *= decay(to_end=walk.reverse)
            scored *= decays.between(transposed=walk.reverse) * scale
            (result,) = tile.added_products((result, [(part, v_own) for part in tile.split(scored)]), staging=stage)
            plgpu.barrier_arrive(used.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own_out[...] = result.astype(jnp.bfloat16)
            plgpu.commit_smem()
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(own_out, out.at[batch, tokens, head, own_values])
            return tuple(next_states)

        states = tuple(tile.load_global(entering.at[batch, of_states, stretch, rows, columns]) for rows in all_keys)
        states = lax.fori_loop(0, walk.steps(stretch) + nothing[0], step_body, states)

        @pl.when(walk.closes(stretch))
        def _leave() -> None:
            for rows, state in zip(all_keys, states, strict=True):
                left[0][batch, of_states, rows, columns] = state

        plgpu.wait_smem_to_gmem(0)
