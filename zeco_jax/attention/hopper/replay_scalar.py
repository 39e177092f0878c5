"""Kernel: outputs, for one decay per token and head."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.decays import Decays, sums_of, write_positions
from zeco_jax.attention.hopper.fetching import fetch_chunks
from zeco_jax.attention.hopper.launch import COMPUTING_REGISTERS, bfloat16, hidden_zero, launch, left_state, stage_of
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

_SLOTS = 2


def replay_scalar(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sums: jax.Array,
    entering: jax.Array,
    *,
    walk: Walk,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    r"""The outputs of every token; a block of threads holds the states of all key channels for a tile of the values.

    .. math:: o_i = \text{scale} \Big(e^{b_i} q_i S + \sum_{j \le i} e^{b_i - b_j} (q_i k_j^\top) v_j\Big)

    with :math:`b` the gates' sums since the chunk began and S the state that enters the chunk.

    Args:
        q: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE, at most two of them.
        k: [B, T, H, K] bfloat16.
        v: [B, T, H, V] bfloat16, V a multiple of TILE.
        sums: [B or 1, H, T] float32, the gates' sums since each chunk began.
        entering: [B, H, stretches, K, V] float32, the state that enters each stretch.
        walk: the stretches, forward.
        scale: factor on the outputs.
        interpret: simulate the kernel.

    Returns:
        [B, T, H, V] bfloat16; with one stretch also the state that leaves it, [B, H, K, V] float32.
    """
    batch, _, heads, width = v.shape
    key_width = q.shape[-1]
    return launch(
        partial(_replay, walk=walk, scale=scale),
        (q, k, v, sums, entering),
        (bfloat16(*v.shape), *left_state(walk, batch, heads, key_width, width)),
        {
            "q_tile": tile.bf16_tile(_SLOTS, CHUNK, key_width),
            "k_tile": tile.bf16_tile(_SLOTS, CHUNK, key_width),
            "v_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
            # The last row is for the positions.
            "sums_tile": plgpu.SMEM((_SLOTS + 1, CHUNK), jnp.float32),
            # Of the values, as the state takes them; the scores take them undecayed.
            "decayed_tile": tile.bf16_tile(COMPUTING, CHUNK, HALF),
            "state_tile": tile.bf16_tile(COMPUTING, TILE, HALF),
            "out_tile": tile.bf16_tile(COMPUTING, CHUNK, HALF),
            "fetched": plgpu.Barrier(num_arrivals=4, num_barriers=_SLOTS),
            "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
        },
        name="replay_scalar",
        walk=walk,
        state=(batch, heads, TILE, width),
        interpret=interpret,
    )


def _replay(
    q: Ref,
    k: Ref,
    v: Ref,
    sums: Ref,
    entering: Ref,
    nothing: Ref,
    out: Ref,
    *left: Ref,
    walk: Walk,
    scale: float,
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
    all_keys = [pl.ds(first, TILE) for first in range(0, q.shape[-1], TILE)]

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        def fetch(chunk: jax.Array, tokens: pl.Slice, slot: jax.Array) -> None:
            del chunk
            full, of_values = fetched.at[slot], pl.ds(value_tile * TILE, TILE)
            plgpu.copy_gmem_to_smem(q.at[batch, tokens, head], q_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(k.at[batch, tokens, head], k_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(v.at[batch, tokens, head, of_values], v_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(sums_of(sums, batch, head, tokens), sums_tile.at[slot], full)

        fetch_chunks(walk, stretch, fetch, used=used, slots=_SLOTS)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        stage = stage_of(staging, warpgroup)
        own_values = pl.ds(value_tile * TILE + warpgroup * HALF, HALF)
        positions = sums_tile.at[_SLOTS]
        # Both warpgroups write the same.
        write_positions(positions)

        def step_body(step: jax.Array, states: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slot = lax.rem(step, _SLOTS)
            mine = warpgroup + hidden_zero(step)
            own_decayed, own_state, own_out = (x.at[mine] for x in (decayed_tile, state_tile, out_tile))
            values, decays = v_tile.at[slot, :, tile.half(mine)], Decays(sums_tile.at[slot], positions)
            scored, result, next_states = tile.zeros(CHUNK, CHUNK), tile.zeros(CHUNK, HALF), []
            for of_keys, state in zip(all_keys, states, strict=True):
                own_state[...] = state.astype(jnp.bfloat16)
                if not next_states:
                    plgpu.barrier_wait(fetched.at[slot])
                    after = tile.along_rows(decays.after(), HALF)
                    own_decayed[...] = (tile.load(values) * after).astype(jnp.bfloat16)
                plgpu.commit_smem()
                queries, keys = (x.at[slot, :, of_keys] for x in (q_tile, k_tile))
                keys = keys.transpose((1, 0))
                scored, result, state = tile.added_products(
                    (scored, [(queries, keys)]),
                    (result, [(queries, own_state)]),
                    (state * decays.whole(), [(keys, own_decayed)]),
                    staging=stage,
                )
                next_states.append(state)
            result *= tile.along_rows(decays.before() * scale, HALF)
            terms = [(part, values) for part in tile.split(scored * (decays.between() * scale))]
            (result,) = tile.added_products((result, terms), staging=stage)
            plgpu.barrier_arrive(used.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own_out[...] = result.astype(jnp.bfloat16)
            plgpu.commit_smem()
            tokens = pl.ds(walk.chunk(stretch, step) * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(own_out, out.at[batch, tokens, head, own_values])
            return tuple(next_states)

        states = tuple(tile.load_global(entering.at[batch, head, stretch, rows, own_values]) for rows in all_keys)
        states = lax.fori_loop(0, walk.steps(stretch) + nothing[0], step_body, states)
        for target in left:
            for rows, state in zip(all_keys, states, strict=True):
                target[batch, head, rows, own_values] = state
        plgpu.wait_smem_to_gmem(0)
