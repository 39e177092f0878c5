"""Kernel: what stretches of tokens do to the state, and on request every chunk's, for one decay per token and head."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.decays import Decays, sums_of
from zeco_jax.attention.hopper.fetching import fetch_chunks
from zeco_jax.attention.hopper.launch import COMPUTING_REGISTERS, bfloat16, float32, launch, stage_of
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

# Chunks in flight: one is worked on while others are fetched.
_SLOTS = 4


def stretch_states_scalar(
    keys: jax.Array, values: jax.Array, sums: jax.Array, *, walk: Walk, scale: float = 1.0, interpret: bool = False
) -> jax.Array:
    r"""What each stretch leaves of a state of zeros.

    .. math:: S \leftarrow e^{b_C} S + \text{scale} \sum_t e^{d_t} k_t v_t^\top

    chunk by chunk, with :math:`d_t` the sum of the gates after token t in its chunk (forward: keys and values) or of
    those up to and including its own (reverse: queries and the outputs' cotangents), :math:`b_C` of the whole chunk.

    Args:
        keys: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        values: [B, T, H, V] bfloat16, V a multiple of TILE.
        sums: [B or 1, H, T] float32, the gates' sums since each chunk began.
        walk: the stretches.
        scale: factor on the states.
        interpret: simulate the kernel.

    Returns:
        [B, H, stretches, K, V] float32.
    """
    shape = float32(keys.shape[0], keys.shape[2], walk.stretches, keys.shape[3], values.shape[3])
    return _launch((keys, values, sums), shape, walk=walk, scale=scale, interpret=interpret)


def chunk_states_scalar(
    keys: jax.Array, values: jax.Array, sums: jax.Array, entering: jax.Array, *, walk: Walk, interpret: bool = False
) -> jax.Array:
    """The state that enters each chunk, given those that enter the stretches.

    Args:
        keys: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        values: [B, T, H, V] bfloat16, V a multiple of TILE.
        sums: [B or 1, H, T] float32, the gates' sums since each chunk began.
        entering: [B, H, stretches, K, V] float32.
        walk: the stretches, forward.
        interpret: simulate the kernel.

    Returns:
        [B, H, chunks, K, V] bfloat16.
    """
    shape = bfloat16(keys.shape[0], keys.shape[2], walk.chunks, keys.shape[3], values.shape[3])
    return _launch((keys, values, sums, entering), shape, walk=walk, scale=1.0, interpret=interpret)


def _launch(
    inputs: tuple[jax.Array, ...], output: jax.ShapeDtypeStruct, *, walk: Walk, scale: float, interpret: bool
) -> jax.Array:
    batch, heads, _, key_width, value_width = output.shape
    is_traced = len(inputs) > 3
    scratch = {
        "keys_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
        "values_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
        "sums_tile": plgpu.SMEM((_SLOTS, CHUNK), jnp.float32),
        "fetched": plgpu.Barrier(num_arrivals=3, num_barriers=_SLOTS),
        "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
    }
    if is_traced:
        scratch["state_tile"] = tile.bf16_tile(COMPUTING, HALF, TILE)
    (states,) = launch(
        partial(_traced if is_traced else _summarized, walk=walk, scale=scale),
        inputs,
        (output,),
        scratch,
        name="chunk_states_scalar" if is_traced else "stretch_states_scalar",
        walk=walk,
        state=(batch, heads, key_width, value_width),
        interpret=interpret,
    )
    return states


def _summarized(keys: Ref, values: Ref, sums: Ref, nothing: Ref, states: Ref, **memory: Ref) -> None:
    del nothing
    _walk(keys, values, sums, None, states, state_tile=None, **memory)


def _traced(keys: Ref, values: Ref, sums: Ref, entering: Ref, nothing: Ref, states: Ref, **memory: Ref) -> None:
    del nothing
    _walk(keys, values, sums, entering, states, **memory)


def _walk(
    keys: Ref,
    values: Ref,
    sums: Ref,
    entering: Ref | None,
    states: Ref,
    *,
    walk: Walk,
    scale: float,
    keys_tile: Ref,
    values_tile: Ref,
    sums_tile: Ref,
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
            del chunk
            full, of_keys = fetched.at[slot], pl.ds(key_tile * TILE, TILE)
            plgpu.copy_gmem_to_smem(sums_of(sums, batch, head, tokens), sums_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(keys.at[batch, tokens, head, of_keys], keys_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(values.at[batch, tokens, head, of_values], values_tile.at[slot], full)

        fetch_chunks(walk, stretch, fetch, used=used, slots=_SLOTS)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        own, stage = tile.half(warpgroup), stage_of(staging, warpgroup)
        own_rows = pl.ds(key_tile * TILE + warpgroup * HALF, HALF)

        def leave(chunk: jax.Array, state: jax.Array) -> None:
            own_state = state_tile.at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own_state[...] = state.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_state, states.at[batch, head, chunk, own_rows, of_values])

        def step_body(step: jax.Array, state: jax.Array) -> jax.Array:
            slot = lax.rem(step, _SLOTS)
            if entering is not None:
                leave(walk.chunk(stretch, step), state)
            plgpu.barrier_wait(fetched.at[slot])
            decays = Decays(sums_tile.at[slot])
            own_keys = keys_tile.at[slot, :, own]
            weights = decays.before() if walk.reverse else decays.after()
            own_keys[...] = (tile.load(own_keys) * tile.along_rows(weights, HALF)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            terms = (own_keys.transpose((1, 0)), values_tile.at[slot])
            state = state * decays.whole() + tile.product((HALF, TILE), terms, staging=stage)
            plgpu.barrier_arrive(used.at[slot])
            return state

        if entering is None:
            state = tile.zeros(HALF, TILE)
        else:
            state = tile.load_global(entering.at[batch, head, stretch, own_rows, of_values])
        state = lax.fori_loop(0, walk.steps(stretch), step_body, state)
        if entering is None:
            states[batch, head, stretch, own_rows, of_values] = state * scale
        plgpu.wait_smem_to_gmem(0)
