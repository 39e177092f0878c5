"""Kernel: outputs from queries, keys and scores that have been decayed."""

from functools import partial
from typing import NamedTuple

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
    hidden_zero,
    launch,
    left_state,
    stage_of,
)
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

# Chunks' values and scores in flight, and tiles of queries and keys.
_SLOTS = 2
_KEY_SLOTS = 2


class Decayed(NamedTuple):
    """What of a replay is done once for all values.

    Attributes:
        queries: [B, T, H, K] bfloat16, decayed from the start of their chunk, times the scale.
        keys: [B, T, H, K] bfloat16, decayed to the end of their chunk.
        totals: [B, H, chunks, K] float32, the gates' sums over each chunk.
        scores: [B, H, chunks, 2, CHUNK, CHUNK] bfloat16, within each chunk, in two parts that are to be summed.
        strong: [B, H, chunks] int32, of which chunks the scores are elsewhere.
        strong_scores: there, in the same places.
    """

    queries: jax.Array
    keys: jax.Array
    totals: jax.Array
    scores: jax.Array
    strong: jax.Array
    strong_scores: jax.Array


def decayed_replay(
    decayed: Decayed,
    values: jax.Array,
    entering: jax.Array,
    *,
    walk: Walk,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    r"""The outputs of every token; a block of threads holds the states of all key channels for a tile of the values.

    .. math::
        o_i = \tilde q_i S + \sum_{j \le i} P_{ij} v_j, \qquad
        S \leftarrow e^{b_C} \odot S + \sum_j \tilde k_j v_j^\top

    In reverse the gradients of the values from the cotangents of the outputs:

    .. math::
        dv_j = \tilde k_j D + \sum_{i \ge j} P_{ij} do_i, \qquad
        D \leftarrow e^{b_C} \odot D + \sum_i \tilde q_i do_i^\top

    Args:
        decayed: queries, keys and scores of every chunk; K at most two tiles.
        values: [B, T, H, V] bfloat16, T a multiple of CHUNK, V of TILE; in reverse the outputs' cotangents.
        entering: [B, H, stretches, K, V] float32, the state that enters each stretch; in reverse its cotangent.
        walk: the stretches.
        interpret: simulate the kernel.

    Returns:
        [B, T, H, V] bfloat16; of a closed walk the state it ends with, [B, H, K, V] float32; in reverse also the
        cotangents of the states that leave the chunks, [B, H, chunks, K, V] bfloat16.
    """
    batch, _, heads, width = values.shape
    queries, keys, totals, *scores = decayed
    key_width = totals.shape[-1]
    outputs = [bfloat16(*values.shape), *left_state(walk, batch, heads, key_width, width)]
    key_tiles = key_width // TILE
    scratch = {
        "q_tile": tile.bf16_tile(_KEY_SLOTS, CHUNK, TILE),
        "k_tile": tile.bf16_tile(_KEY_SLOTS, CHUNK, TILE),
        "totals_tile": plgpu.SMEM((_KEY_SLOTS, TILE), jnp.float32),
        "v_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
        "scores_tile": tile.bf16_tile(_SLOTS, 2, CHUNK, CHUNK),
        "state_tile": tile.bf16_tile(COMPUTING, key_tiles, TILE, HALF),
        "out_tile": tile.bf16_tile(COMPUTING, CHUNK, HALF),
        "keys_fetched": plgpu.Barrier(num_arrivals=3, num_barriers=_KEY_SLOTS),
        "keys_used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_KEY_SLOTS),
        "fetched": plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
        "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
    }
    if walk.reverse:
        queries, keys = keys, queries
        outputs.append(bfloat16(batch, heads, walk.chunks, key_width, width))
    return launch(
        partial(_replay, key_tiles=key_tiles, walk=walk),
        (queries, keys, totals, *scores, values, entering),
        outputs,
        scratch,
        name="decayed_replay_reverse" if walk.reverse else "decayed_replay",
        stretches=walk.stretches,
        state=(batch, heads, TILE, width),
        interpret=interpret,
    )


def _replay(
    queries: Ref,
    keys: Ref,
    totals: Ref,
    scores: Ref,
    strong: Ref,
    strong_scores: Ref,
    values: Ref,
    entering: Ref,
    nothing: Ref,
    out: Ref,
    *others: Ref,
    key_tiles: int,
    walk: Walk,
    q_tile: Ref,
    k_tile: Ref,
    totals_tile: Ref,
    v_tile: Ref,
    scores_tile: Ref,
    state_tile: Ref,
    out_tile: Ref,
    keys_fetched: Ref,
    keys_used: Ref,
    fetched: Ref,
    used: Ref,
    staging: Ref | None,
) -> None:
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    value_tile, warpgroup = lax.axis_index("value_tile"), lax.axis_index("warpgroup")
    left, kept = others[: walk.closed], others[walk.closed :]
    steps = walk.steps(stretch)
    all_keys = [pl.ds(key_tile * TILE, TILE) for key_tile in range(key_tiles)]

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        @pl.loop(0, steps)
        def _step(step: jax.Array) -> None:
            chunk = walk.chunk(stretch, step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            is_strong = strong[batch, head, chunk] != 0
            for key_tile, of_keys in enumerate(all_keys):
                place = step * key_tiles + key_tile
                slot = lax.rem(place, _KEY_SLOTS)
                full = keys_fetched.at[slot]
                pl.when(place >= _KEY_SLOTS)(partial(plgpu.barrier_wait, keys_used.at[slot]))
                plgpu.copy_gmem_to_smem(totals.at[batch, head, chunk, of_keys], totals_tile.at[slot], full)
                plgpu.copy_gmem_to_smem(queries.at[batch, tokens, head, of_keys], q_tile.at[slot], full)
                plgpu.copy_gmem_to_smem(keys.at[batch, tokens, head, of_keys], k_tile.at[slot], full)
                if key_tile == 0:
                    slot, of_values = lax.rem(step, _SLOTS), pl.ds(value_tile * TILE, TILE)
                    full = fetched.at[slot]
                    pl.when(step >= _SLOTS)(partial(plgpu.barrier_wait, used.at[slot]))
                    for where, source in ((is_strong, strong_scores), (jnp.logical_not(is_strong), scores)):
                        place = source.at[batch, head, chunk]
                        pl.when(where)(partial(plgpu.copy_gmem_to_smem, place, scores_tile.at[slot], full))
                    plgpu.copy_gmem_to_smem(values.at[batch, tokens, head, of_values], v_tile.at[slot], full)

        # A barrier may not go while somebody has still to pass it.
        for barrier, slots, places in ((keys_used, _KEY_SLOTS, steps * key_tiles), (used, _SLOTS, steps)):

            @pl.loop(jnp.maximum(places - slots, 0), places)
            def _drain(place: jax.Array, barrier: Ref = barrier, slots: int = slots) -> None:
                plgpu.barrier_wait(barrier.at[lax.rem(place, slots)])

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        stage = stage_of(staging, warpgroup)
        # Copies that may be under way when something is written: all later ones than that of what was there before.
        later_copies = key_tiles * len(kept)
        own_values = pl.ds(value_tile * TILE + warpgroup * HALF, HALF)

        def step_body(step: jax.Array, states: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slot = lax.rem(step, _SLOTS)
            chunk = walk.chunk(stretch, step)
            # Pallas's `run_state` takes no constants as indices.
            zero = hidden_zero(step)
            mine = warpgroup + zero
            own_out, v_own = out_tile.at[mine], v_tile.at[slot, :, tile.half(mine)]
            next_states = []
            result = tile.zeros(CHUNK, HALF)
            for key_tile, state in enumerate(states):
                key_slot = lax.rem(step * key_tiles + key_tile, _KEY_SLOTS)
                own_state = state_tile.at[mine, key_tile + zero]
                if kept:
                    plgpu.wait_smem_to_gmem(later_copies, wait_read_only=True)
                own_state[...] = state.astype(jnp.bfloat16)
                plgpu.commit_smem()
                for target in kept:
                    place = target.at[batch, head, chunk, all_keys[key_tile], own_values]
                    plgpu.copy_smem_to_gmem(own_state, place)
                plgpu.barrier_wait(keys_fetched.at[key_slot])
                terms = [(q_tile.at[key_slot], own_state)]
                if key_tile == 0:
                    plgpu.barrier_wait(fetched.at[slot])
                    parts = [scores_tile.at[slot, i + zero] for i in range(2)]
                    terms += [(part.transpose((1, 0)) if walk.reverse else part, v_own) for part in parts]
                decay = jnp.exp(plgpu.load(totals_tile.at[key_slot], layout=tile.ROW))
                result, state = tile.added_products(
                    (result, terms),
                    (state * tile.along_rows(decay, HALF), [(k_tile.at[key_slot].transpose((1, 0)), v_own)]),
                    staging=stage,
                )
                plgpu.barrier_arrive(keys_used.at[key_slot])
                next_states.append(state)
            plgpu.barrier_arrive(used.at[slot])
            plgpu.wait_smem_to_gmem(later_copies, wait_read_only=True)
            own_out[...] = result.astype(jnp.bfloat16)
            plgpu.commit_smem()
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(own_out, out.at[batch, tokens, head, own_values])
            return tuple(next_states)

        states = tuple(tile.load_global(entering.at[batch, head, stretch, rows, own_values]) for rows in all_keys)
        states = lax.fori_loop(0, steps + nothing[0], step_body, states)

        @pl.when(walk.closes(stretch))
        def _leave() -> None:
            for rows, state in zip(all_keys, states, strict=True):
                left[0][batch, head, rows, own_values] = state

        plgpu.wait_smem_to_gmem(0)
