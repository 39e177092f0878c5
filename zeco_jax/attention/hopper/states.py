"""Kernel: what stretches of tokens do to a state of one tile, and on request the state that enters each chunk."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.fetching import fetch_chunks
from zeco_jax.attention.hopper.launch import (
    COMPUTING_REGISTERS,
    bfloat16,
    float32,
    launch,
    left_state,
    stage_of,
)
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, FACTORED_LIMIT, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

# Chunks in flight: one is worked on while the next is fetched.
_SLOTS = 2


def stretch_states(
    keys: jax.Array,
    values: jax.Array,
    gates: jax.Array,
    *,
    walk: Walk,
    scale: float = 1.0,
    paired: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    r"""What each stretch leaves of a state of zeros, and by how much it decays a state.

    .. math:: S \leftarrow e^{b_C} \odot S + \text{scale} \sum_t (e^{d_t} \odot k_t) v_t^\top

    chunk by chunk, with :math:`d_t` the sum of the gates after token t in its chunk (forward: keys and values) or of
    those up to and including its own (reverse: queries and the outputs' cotangents), :math:`b_C` of the whole chunk.

    Args:
        keys: [B, T, H, TILE] bfloat16, T a multiple of CHUNK.
        values: [B, T, H, TILE] bfloat16.
        gates: [B, T, H, TILE] float32.
        walk: the stretches; of a closed walk the last one walked is left out.
        scale: factor on the states.
        paired: see `tile.own_head`.
        interpret: simulate the kernel.

    Returns:
        States [B, H, summarized, TILE, TILE], of paired heads [B, 2 H, summarized, HALF, HALF], and the sums of the
        gates of every stretch [B, H, summarized, TILE], float32.
    """
    batch, _, heads, _ = keys.shape
    of_states, *state = tile.state_shape(heads, paired=paired)
    count = len(walk.summarized)
    outputs = (float32(batch, of_states, count, *state), float32(batch, heads, count, TILE))
    return _launch((keys, values, gates), outputs, walk=walk, scale=scale, paired=paired, interpret=interpret)


def chunk_states(
    keys: jax.Array,
    values: jax.Array,
    gates: jax.Array,
    entering: jax.Array,
    *,
    walk: Walk,
    scale: float = 1.0,
    paired: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    r"""The state that enters each chunk, given those that enter the stretches.

    In reverse (queries and the outputs' cotangents): the cotangent D of the state that leaves each chunk, as
    :math:`e^{b_C} \odot D` in channels whose gates' sum over the chunk, :math:`b_C`, is at least FACTORED_LIMIT.

    Args:
        keys: [B, T, H, TILE] bfloat16, T a multiple of CHUNK.
        values: [B, T, H, TILE] bfloat16.
        gates: [B, T, H, TILE] float32.
        entering: [B, H, stretches, TILE, TILE] float32; of paired heads all states are [B, 2 H, *, HALF, HALF].
        walk: the stretches.
        scale: factor on what keys and values add.
        paired: see `tile.own_head`.
        interpret: simulate the kernel.

    Returns:
        [B, H, chunks, TILE, TILE] bfloat16, the gates' sums over each chunk [B, H, chunks, TILE] float32, and of
        a closed walk the state it ends with, [B, H, TILE, TILE] float32.
    """
    batch, _, heads, _ = keys.shape
    of_states, *state = tile.state_shape(heads, paired=paired)
    outputs = (
        bfloat16(batch, of_states, walk.chunks, *state),
        float32(batch, heads, walk.chunks, TILE),
        *left_state(walk, batch, of_states, *state),
    )
    return _launch((keys, values, gates, entering), outputs, walk=walk, scale=scale, paired=paired, interpret=interpret)


def _launch(
    inputs: tuple[jax.Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    walk: Walk,
    scale: float,
    paired: bool,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    batch, _, heads, _ = inputs[0].shape
    is_traced = len(inputs) > 3
    scratch = {
        "keys_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
        "values_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
        "gates_tile": tile.fp32_tile(_SLOTS, CHUNK, TILE),
        "pair": tile.bf16_tile(COMPUTING, 2, CHUNK, HALF),
        # Which gates decay each token.
        "weights": tile.bf16_tile(CHUNK, CHUNK),
        "ones": tile.bf16_tile(CHUNK, CHUNK),
        "fetched": plgpu.Barrier(num_arrivals=3, num_barriers=_SLOTS),
        "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
    }
    if is_traced:
        scratch["state_tile"] = tile.bf16_tile(COMPUTING, HALF, inputs[3].shape[-1])
    return launch(
        partial(_traced if is_traced else _summarized, walk=walk, scale=scale, paired=paired),
        inputs,
        outputs,
        scratch,
        name="chunk_states" if is_traced else "stretch_states",
        stretches=walk.stretches if is_traced else len(walk.summarized),
        state=(batch, heads, TILE, TILE),
        interpret=interpret,
    )


def _summarized(
    keys: Ref,
    values: Ref,
    gates: Ref,
    nothing: Ref,
    states: Ref,
    totals: Ref,
    *,
    walk: Walk,
    paired: bool,
    **options: Any,
) -> None:
    del nothing
    batch, head, index = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    own, of_states, rows = _place(head, paired=paired)

    def before(chunk: jax.Array, state: jax.Array, total: jax.Array) -> None:
        del chunk, state, total

    def after(state: jax.Array, total: jax.Array) -> None:
        states[batch, of_states, index, rows] = state
        totals[batch, head, index, own] = total

    def first() -> jax.Array:
        return tile.zeros(HALF, states.shape[-1])

    stretch = index + walk.summarized.start
    _walk(keys, values, gates, stretch, first, before, after, walk=walk, paired=paired, **options)


def _traced(
    keys: Ref,
    values: Ref,
    gates: Ref,
    entering: Ref,
    nothing: Ref,
    states: Ref,
    totals: Ref,
    *left: Ref,
    state_tile: Ref,
    walk: Walk,
    paired: bool,
    **options: Any,
) -> None:
    del nothing
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    own, of_states, rows = _place(head, paired=paired)
    own_state = state_tile.at[lax.axis_index("warpgroup")]

    def before(chunk: jax.Array, state: jax.Array, total: jax.Array) -> None:
        totals[batch, head, chunk, own] = total
        if walk.reverse:
            decay = jnp.exp(jnp.where(total < FACTORED_LIMIT, 0.0, total))
            state *= tile.along_rows(decay, state.shape[-1])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        own_state[...] = state.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_state, states.at[batch, of_states, chunk, rows])

    def after(state: jax.Array, total: jax.Array) -> None:
        del total

        @pl.when(walk.closes(stretch))
        def _close() -> None:
            left[0][batch, of_states, rows] = state

        plgpu.wait_smem_to_gmem(0)

    def first() -> jax.Array:
        return tile.load_global(entering.at[batch, of_states, stretch, rows])

    _walk(keys, values, gates, stretch, first, before, after, walk=walk, paired=paired, **options)


def _place(head: jax.Array, *, paired: bool) -> tuple[pl.Slice, jax.Array, pl.Slice]:
    """A warpgroup's channels of the tile; the head, and of it the rows, of its states."""
    warpgroup = lax.axis_index("warpgroup")
    own = tile.half(warpgroup)
    return own, tile.own_head(head, warpgroup, paired=paired), tile.in_state(own, paired=paired)


def _walk(
    keys: Ref,
    values: Ref,
    gates: Ref,
    stretch: jax.Array,
    first: Callable[[], jax.Array],
    before: Callable[[jax.Array, jax.Array, jax.Array], None],
    after: Callable[[jax.Array, jax.Array], None],
    *,
    walk: Walk,
    scale: float,
    paired: bool,
    keys_tile: Ref,
    values_tile: Ref,
    gates_tile: Ref,
    pair: Ref,
    weights: Ref,
    ones: Ref,
    fetched: Ref,
    used: Ref,
    staging: Ref | None,
) -> None:
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        def fetch(chunk: jax.Array, tokens: pl.Slice, slot: jax.Array) -> None:
            del chunk
            for source, target in ((gates, gates_tile), (keys, keys_tile), (values, values_tile)):
                plgpu.copy_gmem_to_smem(source.at[batch, tokens, head], target.at[slot], fetched.at[slot])

        fetch_chunks(walk, stretch, fetch, used=used, slots=_SLOTS)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        own = tile.half(warpgroup)
        own_pair, stage = pair.at[warpgroup], stage_of(staging, warpgroup)
        rows, columns = tile.indices()
        # In memory: ptxas 13.0 sets registers of constant weights after the product that reads them.
        # Both warpgroups write the same.
        weights[...] = tile.ones_where(columns <= rows if walk.reverse else columns > rows)
        ones[...] = tile.ones_where(rows >= 0)

        def step_body(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            state, so_far = carry
            slot = lax.rem(step, _SLOTS)
            plgpu.barrier_wait(fetched.at[slot])
            tile.write_split(own_pair, jnp.maximum(tile.load(gates_tile.at[slot, :, own]), tile.WEAKEST_GATE))
            plgpu.commit_smem()
            decays, total = tile.products(
                ((CHUNK, HALF), [(weights, own_pair.at[0]), (weights, own_pair.at[1])]),
                ((HALF, CHUNK), [(own_pair.at[i].transpose((1, 0)), ones) for i in range(2)]),
                staging=stage,
            )
            # Every column is the same.
            total = jnp.max(total, axis=1)
            own_keys = keys_tile.at[slot, :, own]
            own_keys[...] = (tile.load(own_keys) * tile.scaled_exp(decays, scale)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            before(walk.chunk(stretch, step), state, total)
            state *= tile.along_rows(jnp.exp(total), state.shape[-1])
            seen = values_tile.at[slot, :, own] if paired else values_tile.at[slot]
            (state,) = tile.added_products((state, [(own_keys.transpose((1, 0)), seen)]), staging=stage)
            plgpu.barrier_arrive(used.at[slot])
            return state, so_far + total

        nothing_yet = plgpu.layout_cast(jnp.zeros(HALF, jnp.float32), tile.ROW)
        after(*lax.fori_loop(0, walk.steps(stretch), step_body, (first(), nothing_yet)))
