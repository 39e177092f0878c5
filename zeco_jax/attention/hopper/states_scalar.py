"""Kernel: what stretches of tokens do to the state, and on request every chunk's, for one decay per token and head."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.decays import Decays, sums_of
from zeco_jax.attention.hopper.launch import bfloat16, float32
from zeco_jax.attention.hopper.tile import CHUNK, HALF, TILE
from zeco_jax.attention.hopper.walk import Walk
from zeco_jax.attention.hopper.walked_states import Fetched, Leave, walk_states


def stretch_states_scalar(
    keys: jax.Array, values: jax.Array, sums: jax.Array, *, walk: Walk, scale: float = 1.0, interpret: bool = False
) -> jax.Array:
    r"""What stretches leave of a state of zeros.

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
        [B, H, summarized, K, V] float32, of the stretches `walk.summarized`.
    """
    shape = float32(keys.shape[0], keys.shape[2], len(walk.summarized), keys.shape[3], values.shape[3])
    return _states(
        (keys, values, sums), shape, name="stretch_states_scalar", walk=walk, scale=scale, interpret=interpret
    )


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
    return _states(
        (keys, values, sums, entering), shape, name="chunk_states_scalar", walk=walk, scale=1.0, interpret=interpret
    )


def _states(
    inputs: tuple[jax.Array, ...], output: jax.ShapeDtypeStruct, *, name: str, walk: Walk, scale: float, interpret: bool
) -> jax.Array:
    return walk_states(
        partial(_step, reverse=walk.reverse),
        lambda sums, place: sums_of(sums, place.batch, place.head, place.tokens),
        inputs,
        output,
        decays_width=CHUNK,
        name=name,
        walk=walk,
        scale=scale,
        interpret=interpret,
    )


def _step(chunk: Fetched, state: jax.Array, leave: Leave | None, *, reverse: bool) -> jax.Array:
    if leave is not None:
        leave(state)
    plgpu.barrier_wait(chunk.there)
    decays = Decays(chunk.decays)
    weights = decays.before() if reverse else decays.after()
    chunk.keys[...] = (tile.load(chunk.keys) * tile.along_rows(weights, HALF)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    terms = (chunk.keys.transpose((1, 0)), chunk.values)
    state = state * decays.whole() + tile.product((HALF, TILE), terms, staging=chunk.staging)
    plgpu.barrier_arrive(chunk.used)
    return state
