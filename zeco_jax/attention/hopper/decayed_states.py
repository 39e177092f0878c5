"""Kernel: what stretches of tokens do to the state, and on request every chunk's, from keys that have been decayed."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.launch import bfloat16, float32
from zeco_jax.attention.hopper.tile import TILE
from zeco_jax.attention.hopper.walk import Walk
from zeco_jax.attention.hopper.walked_states import Fetched, Leave, walk_states


def decayed_stretch_states(
    decayed: jax.Array, values: jax.Array, totals: jax.Array, *, walk: Walk, interpret: bool = False
) -> jax.Array:
    r"""What stretches leave of a state of zeros.

    .. math:: S \leftarrow e^{b_C} \odot S + \sum_t \tilde k_t v_t^\top

    chunk by chunk, with :math:`\tilde k_t` as `decayed_keys` gives them.

    Args:
        decayed: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        values: [B, T, H, V] bfloat16, V a multiple of TILE.
        totals: [B, H, chunks, K] float32, the gates' sums over each chunk.
        walk: the stretches.
        interpret: simulate the kernel.

    Returns:
        [B, H, summarized, K, V] float32, of the stretches `walk.summarized`.
    """
    batch, _, heads, width = decayed.shape
    output = float32(batch, heads, len(walk.summarized), width, values.shape[-1])
    return _states((decayed, values, totals), output, name="decayed_stretch_states", walk=walk, interpret=interpret)


def decayed_chunk_states(
    decayed: jax.Array,
    values: jax.Array,
    totals: jax.Array,
    entering: jax.Array,
    *,
    walk: Walk,
    interpret: bool = False,
) -> jax.Array:
    """The state that enters each chunk, given those that enter the stretches.

    Args:
        decayed: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        values: [B, T, H, V] bfloat16, V a multiple of TILE.
        totals: [B, H, chunks, K] float32, the gates' sums over each chunk.
        entering: [B, H, stretches, K, V] float32.
        walk: the stretches, forward.
        interpret: simulate the kernel.

    Returns:
        [B, H, chunks, K, V] bfloat16.
    """
    batch, _, heads, width = decayed.shape
    output = bfloat16(batch, heads, walk.chunks, width, values.shape[-1])
    return _states(
        (decayed, values, totals, entering), output, name="decayed_chunk_states", walk=walk, interpret=interpret
    )


def _states(
    inputs: tuple[jax.Array, ...], output: jax.ShapeDtypeStruct, *, name: str, walk: Walk, interpret: bool
) -> jax.Array:
    return walk_states(
        _step,
        lambda totals, place: totals.at[place.batch, place.head, place.chunk, place.keys],
        inputs,
        output,
        decays_width=TILE,
        name=name,
        walk=walk,
        interpret=interpret,
    )


def _step(chunk: Fetched, state: jax.Array, leave: Leave | None) -> jax.Array:
    plgpu.barrier_wait(chunk.there)
    total = plgpu.load(chunk.decays.at[tile.half(lax.axis_index("warpgroup"))], layout=tile.ROW)
    if leave is not None:
        leave(state)
    terms = (chunk.keys.transpose((1, 0)), chunk.values)
    state *= tile.along_rows(jnp.exp(total), TILE)
    (state,) = tile.added_products((state, [terms]), staging=chunk.staging)
    plgpu.barrier_arrive(chunk.used)
    return state
