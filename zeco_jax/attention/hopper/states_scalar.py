"""Kernel: what stretches of tokens do to the state, and on request every chunk's, for one decay per token and head."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.decays import Decays, sums_of
from zeco_jax.attention.hopper.launch import bfloat16, float32
from zeco_jax.attention.hopper.tile import CHUNK, HALF
from zeco_jax.attention.hopper.walk import Walk
from zeco_jax.attention.hopper.walked_states import Fetched, Leave, walk_states


def stretch_states_scalar(
    keys: jax.Array, values: jax.Array, sums: jax.Array, *, walk: Walk, scale: float = 1.0, **options: bool
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
        **options: `paired`, see `tile.own_head`, with sums of 2 H heads; `interpret`, simulate the kernel.

    Returns:
        [B, H, summarized, K, V] float32, of the stretches `walk.summarized`; of paired heads [B, 2 H, *, HALF, HALF].
    """
    return _states((keys, values, sums), float32, walk=walk, scale=scale, **options)


def chunk_states_scalar(
    keys: jax.Array, values: jax.Array, sums: jax.Array, entering: jax.Array, *, walk: Walk, **options: bool
) -> jax.Array:
    """The state that enters each chunk, given those that enter the stretches.

    Args:
        keys: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        values: [B, T, H, V] bfloat16, V a multiple of TILE.
        sums: [B or 1, H, T] float32, the gates' sums since each chunk began.
        entering: [B, H, stretches, K, V] float32.
        walk: the stretches, forward.
        **options: as for `stretch_states_scalar`.

    Returns:
        [B, H, chunks, K, V] bfloat16; of paired heads [B, 2 H, *, HALF, HALF].
    """
    return _states((keys, values, sums, entering), bfloat16, walk=walk, scale=1.0, **options)


def _states(
    inputs: tuple[jax.Array, ...],
    output: Callable[..., jax.ShapeDtypeStruct],
    *,
    walk: Walk,
    scale: float,
    paired: bool = False,
    interpret: bool = False,
) -> jax.Array:
    keys, values, *_ = inputs
    batch, _, heads, width = keys.shape
    if paired:
        heads, *state = tile.state_shape(heads, paired=True)
    else:
        state = width, values.shape[-1]
    of_chunks = len(inputs) > 3
    return walk_states(
        partial(_step, reverse=walk.reverse),
        lambda sums, place: sums_of(sums, place.batch, place.head, place.tokens),
        inputs,
        output(batch, heads, walk.chunks if of_chunks else len(walk.summarized), *state),
        decays_width=CHUNK,
        name="chunk_states_scalar" if of_chunks else "stretch_states_scalar",
        walk=walk,
        scale=scale,
        paired=paired,
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
    state = state * decays.whole() + tile.product(state.shape, terms, staging=chunk.staging)
    plgpu.barrier_arrive(chunk.used)
    return state
