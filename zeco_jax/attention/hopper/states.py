"""Kernel: what stretches of tokens do to the state, and on request the state that enters each chunk."""

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
    hidden_zero,
    launch,
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
    together: int = 1,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    r"""What each stretch leaves of a state of zeros, and by how much every chunk decays a state.

    .. math:: S \leftarrow e^{b_C} \odot S + \text{scale} \sum_t (e^{d_t} \odot k_t) v_t^\top

    chunk by chunk, with :math:`d_t` the sum of the gates after token t in its chunk (forward: keys and values) or of
    those up to and including its own (reverse: queries and the outputs' cotangents), :math:`b_C` of the whole chunk.

    Args:
        keys: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        values: [B, T, H, V] bfloat16, V a multiple of TILE.
        gates: [B, T, H, K] float32.
        walk: the stretches.
        scale: factor on the states.
        together: tiles of the values that a block of threads takes, a divisor of their number.
        interpret: simulate the kernel.

    Returns:
        States [B, H, stretches, K, V] and the sums of the gates of every chunk [B, H, chunks, K], float32.
    """
    batch, _, heads, width = keys.shape
    outputs = (
        float32(batch, heads, walk.stretches, width, values.shape[-1]),
        float32(batch, heads, walk.chunks, width),
    )
    return _launch(keys, values, gates, (), outputs, walk=walk, scale=scale, together=together, interpret=interpret)


def chunk_states(
    keys: jax.Array,
    values: jax.Array,
    gates: jax.Array,
    entering: jax.Array,
    *,
    walk: Walk,
    scale: float = 1.0,
    interpret: bool = False,
) -> jax.Array:
    r"""The state that enters each chunk, given those that enter the stretches.

    In reverse (queries and the outputs' cotangents): the cotangent D of the state that leaves each chunk, as
    :math:`e^{b_C} \odot D` in channels whose gates' sum over the chunk, :math:`b_C`, is at least FACTORED_LIMIT.

    Args:
        keys: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        values: [B, T, H, V] bfloat16, V a multiple of TILE.
        gates: [B, T, H, K] float32.
        entering: [B, H, stretches, K, V] float32.
        walk: the stretches.
        scale: factor on what keys and values add.
        interpret: simulate the kernel.

    Returns:
        [B, H, chunks, K, V] bfloat16.
    """
    batch, _, heads, width = keys.shape
    outputs = (bfloat16(batch, heads, walk.chunks, width, values.shape[-1]),)
    (states,) = _launch(keys, values, gates, (entering,), outputs, walk=walk, scale=scale, interpret=interpret)
    return states


def _launch(
    keys: jax.Array,
    values: jax.Array,
    gates: jax.Array,
    entering: tuple[jax.Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    walk: Walk,
    scale: float,
    together: int = 1,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    batch, _, heads, width = keys.shape
    scratch = {
        "keys_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
        "values_tile": tile.bf16_tile(_SLOTS, together, CHUNK, TILE),
        "gates_tile": tile.fp32_tile(_SLOTS, CHUNK, TILE),
        "pair": tile.bf16_tile(COMPUTING, 2, CHUNK, HALF),
        # Which gates decay each token.
        "weights": tile.bf16_tile(CHUNK, CHUNK),
        "ones": tile.bf16_tile(CHUNK, CHUNK),
        "fetched": plgpu.Barrier(num_arrivals=2 + together, num_barriers=_SLOTS),
        "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
    }
    if entering:
        scratch["state_tile"] = tile.bf16_tile(COMPUTING, HALF, TILE)
    return launch(
        partial(_traced if entering else _summarized, walk=walk, scale=scale),
        (keys, values, gates, *entering),
        outputs,
        scratch,
        name="chunk_states" if entering else "stretch_states",
        walk=walk,
        state=(batch, heads, width, values.shape[-1] // together),
        interpret=interpret,
    )


def _summarized(
    keys: Ref,
    values: Ref,
    gates: Ref,
    nothing: Ref,
    states: Ref,
    totals: Ref,
    **options: Any,
) -> None:
    del nothing
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    rows = _rows()

    def before(chunk: jax.Array, left: tuple[jax.Array, ...], total: jax.Array) -> None:
        del left

        @pl.when(lax.axis_index("value_tile") == 0)
        def _write_total() -> None:
            totals[batch, head, chunk, rows] = total

    def after(left: tuple[jax.Array, ...]) -> None:
        for columns, state in zip(_columns(len(left)), left, strict=True):
            states[batch, head, stretch, rows, columns] = state

    def first(columns: pl.Slice) -> jax.Array:
        del columns
        return tile.zeros(HALF, TILE)

    _walk(keys, values, gates, first, before, after, **options)


def _traced(
    keys: Ref,
    values: Ref,
    gates: Ref,
    entering: Ref,
    nothing: Ref,
    states: Ref,
    *,
    state_tile: Ref,
    walk: Walk,
    **options: Any,
) -> None:
    del nothing
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    rows = _rows()
    own = state_tile.at[lax.axis_index("warpgroup")]

    def before(chunk: jax.Array, left: tuple[jax.Array, ...], total: jax.Array) -> None:
        for columns, state in zip(_columns(len(left)), left, strict=True):
            if walk.reverse:
                state *= tile.along_rows(jnp.exp(jnp.where(total < FACTORED_LIMIT, 0.0, total)), TILE)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own[...] = state.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own, states.at[batch, head, chunk, rows, columns])

    def after(left: tuple[jax.Array, ...]) -> None:
        del left
        plgpu.wait_smem_to_gmem(0)

    def first(columns: pl.Slice) -> jax.Array:
        return tile.load_global(entering.at[batch, head, stretch, rows, columns])

    _walk(keys, values, gates, first, before, after, walk=walk, **options)


def _rows() -> pl.Slice:
    """The warpgroup's rows of the state."""
    return pl.ds(lax.axis_index("key_tile") * TILE + lax.axis_index("warpgroup") * HALF, HALF)


def _columns(together: int) -> list[pl.Slice]:
    """The columns of the state that belong to each of the block's tiles of the values."""
    first = lax.axis_index("value_tile") * together
    return [pl.ds((first + i) * TILE, TILE) for i in range(together)]


def _walk(
    keys: Ref,
    values: Ref,
    gates: Ref,
    first: Callable[[pl.Slice], jax.Array],
    before: Callable[[jax.Array, tuple[jax.Array, ...], jax.Array], None],
    after: Callable[[tuple[jax.Array, ...]], None],
    *,
    walk: Walk,
    scale: float,
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
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    warpgroup = lax.axis_index("warpgroup")
    steps = walk.steps(stretch)
    of_keys = pl.ds(lax.axis_index("key_tile") * TILE, TILE)
    of_values = _columns(values_tile.shape[1])

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        def fetch(chunk: jax.Array, tokens: pl.Slice, slot: jax.Array) -> None:
            del chunk
            full = fetched.at[slot]
            plgpu.copy_gmem_to_smem(gates.at[batch, tokens, head, of_keys], gates_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(keys.at[batch, tokens, head, of_keys], keys_tile.at[slot], full)
            for i, columns in enumerate(of_values):
                plgpu.copy_gmem_to_smem(values.at[batch, tokens, head, columns], values_tile.at[slot, i], full)

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

        def step_body(step: jax.Array, left: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
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
            own_keys[...] = (tile.load(own_keys) * (jnp.exp(decays) * scale)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            before(walk.chunk(stretch, step), left, total)
            decay = tile.along_rows(jnp.exp(total), TILE)
            flipped = own_keys.transpose((1, 0))
            # Pallas's `run_state` takes no constants as indices.
            places = (values_tile.at[slot, i + hidden_zero(step)] for i in range(len(left)))
            jobs = ((state * decay, [(flipped, place)]) for state, place in zip(left, places, strict=True))
            left = tile.added_products(*jobs, staging=stage)
            plgpu.barrier_arrive(used.at[slot])
            return left

        after(lax.fori_loop(0, steps, step_body, tuple(map(first, of_values))))
