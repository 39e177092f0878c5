"""Kernel: what stretches of tokens do to the state, and on request every chunk's, from keys that have been decayed."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.fetching import fetch_chunks
from zeco_jax.attention.hopper.launch import COMPUTING_REGISTERS, bfloat16, float32, launch, stage_of
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, FACTORED_LIMIT, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

_SLOTS = 4


def decayed_stretch_states(
    decayed: jax.Array, values: jax.Array, totals: jax.Array, *, walk: Walk, interpret: bool = False
) -> jax.Array:
    r"""What each stretch leaves of a state of zeros.

    .. math:: S \leftarrow e^{b_C} \odot S + \sum_t \tilde k_t v_t^\top

    chunk by chunk, with :math:`\tilde k_t` as `decayed_keys` gives them.

    Args:
        decayed: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        values: [B, T, H, V] bfloat16, V a multiple of TILE.
        totals: [B, H, chunks, K] float32, the gates' sums over each chunk.
        walk: the stretches.
        interpret: simulate the kernel.

    Returns:
        [B, H, stretches, K, V] float32.
    """
    batch, _, heads, width = decayed.shape
    output = float32(batch, heads, walk.stretches, width, values.shape[-1])
    return _launch((decayed, values, totals), output, walk=walk, interpret=interpret)


def decayed_chunk_states(
    decayed: jax.Array,
    values: jax.Array,
    totals: jax.Array,
    entering: jax.Array,
    *,
    walk: Walk,
    interpret: bool = False,
) -> jax.Array:
    """The state that enters each chunk, given those that enter the stretches; as `states.chunk_states`.

    Args:
        decayed: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        values: [B, T, H, V] bfloat16, V a multiple of TILE.
        totals: [B, H, chunks, K] float32, the gates' sums over each chunk.
        entering: [B, H, stretches, K, V] float32.
        walk: the stretches.
        interpret: simulate the kernel.

    Returns:
        [B, H, chunks, K, V] bfloat16.
    """
    batch, _, heads, width = decayed.shape
    output = bfloat16(batch, heads, walk.chunks, width, values.shape[-1])
    return _launch((decayed, values, totals, entering), output, walk=walk, interpret=interpret)


def _launch(inputs: tuple[jax.Array, ...], output: jax.ShapeDtypeStruct, *, walk: Walk, interpret: bool) -> jax.Array:
    batch, heads, _, key_width, value_width = output.shape
    is_traced = len(inputs) > 3
    scratch = {
        "keys_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
        "values_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
        "totals_tile": plgpu.SMEM((_SLOTS, TILE), jnp.float32),
        "fetched": plgpu.Barrier(num_arrivals=3, num_barriers=_SLOTS),
        "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
    }
    if is_traced:
        scratch["state_tile"] = tile.bf16_tile(COMPUTING, HALF, TILE)
    (states,) = launch(
        partial(_traced if is_traced else _summarized, walk=walk),
        inputs,
        (output,),
        scratch,
        name="decayed_chunk_states" if is_traced else "decayed_stretch_states",
        walk=walk,
        state=(batch, heads, key_width, value_width),
        interpret=interpret,
    )
    return states


def _summarized(keys: Ref, values: Ref, totals: Ref, nothing: Ref, states: Ref, **memory: Ref) -> None:
    del nothing
    _walk(keys, values, totals, None, states, state_tile=None, **memory)


def _traced(keys: Ref, values: Ref, totals: Ref, entering: Ref, nothing: Ref, states: Ref, **memory: Ref) -> None:
    del nothing
    _walk(keys, values, totals, entering, states, **memory)


def _walk(
    keys: Ref,
    values: Ref,
    totals: Ref,
    entering: Ref | None,
    states: Ref,
    *,
    walk: Walk,
    keys_tile: Ref,
    values_tile: Ref,
    totals_tile: Ref,
    state_tile: Ref | None,
    fetched: Ref,
    used: Ref,
    staging: Ref | None,
) -> None:
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    key_tile, warpgroup = lax.axis_index("key_tile"), lax.axis_index("warpgroup")
    of_values = pl.ds(lax.axis_index("value_tile") * TILE, TILE)

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        def fetch(chunk: jax.Array, tokens: pl.Slice, slot: jax.Array) -> None:
            full, of_keys = fetched.at[slot], pl.ds(key_tile * TILE, TILE)
            plgpu.copy_gmem_to_smem(totals.at[batch, head, chunk, of_keys], totals_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(keys.at[batch, tokens, head, of_keys], keys_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(values.at[batch, tokens, head, of_values], values_tile.at[slot], full)

        fetch_chunks(walk, stretch, fetch, used=used, slots=_SLOTS)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        own, stage = tile.half(warpgroup), stage_of(staging, warpgroup)
        own_rows = pl.ds(key_tile * TILE + warpgroup * HALF, HALF)

        def leave(chunk: jax.Array, state: jax.Array, total: jax.Array) -> None:
            own_state = state_tile.at[warpgroup]
            if walk.reverse:
                state *= tile.along_rows(jnp.exp(jnp.where(total < FACTORED_LIMIT, 0.0, total)), TILE)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own_state[...] = state.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_state, states.at[batch, head, chunk, own_rows, of_values])

        def step_body(step: jax.Array, state: jax.Array) -> jax.Array:
            slot = lax.rem(step, _SLOTS)
            plgpu.barrier_wait(fetched.at[slot])
            total = plgpu.load(totals_tile.at[slot, own], layout=tile.ROW)
            if entering is not None:
                leave(walk.chunk(stretch, step), state, total)
            terms = (keys_tile.at[slot, :, own].transpose((1, 0)), values_tile.at[slot])
            state *= tile.along_rows(jnp.exp(total), TILE)
            (state,) = tile.added_products((state, [terms]), staging=stage)
            plgpu.barrier_arrive(used.at[slot])
            return state

        if entering is None:
            state = tile.zeros(HALF, TILE)
        else:
            state = tile.load_global(entering.at[batch, head, stretch, own_rows, of_values])
        state = lax.fori_loop(0, walk.steps(stretch), step_body, state)
        if entering is None:
            states[batch, head, stretch, own_rows, of_values] = state
        plgpu.wait_smem_to_gmem(0)
