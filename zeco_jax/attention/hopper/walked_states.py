"""What the kernels of states share whose decays are one vector for each chunk: launch, fetching, where states go."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.fetching import fetch_chunks
from zeco_jax.attention.hopper.launch import COMPUTING_REGISTERS, launch, stage_of
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

# Chunks in flight: one is worked on while others are fetched.
_SLOTS = 4


class Place(NamedTuple):
    """A chunk: its batch, head and number, its tokens, and the channels of the block's tile of keys."""

    batch: jax.Array
    head: jax.Array
    chunk: jax.Array
    tokens: pl.Slice
    keys: pl.Slice


class Fetched(NamedTuple):
    """A chunk in shared memory, and the barriers for when it is there and when it has been read.

    Attributes:
        keys: the warpgroup's [CHUNK, HALF].
        values: [CHUNK, TILE]; of a paired head its own.
        decays: one vector.
        there: wait for it.
        used: arrive at it.
        staging: as in `tile.products`.
    """

    keys: Ref
    values: Ref
    decays: Ref
    there: Ref
    used: Ref
    staging: Ref | None


Leave = Callable[[jax.Array], None]
"""Writes the state that enters the chunk to device memory."""
Step = Callable[[Fetched, jax.Array, Leave | None], jax.Array]
"""From the state that enters a chunk the one that leaves it, the warpgroup's rows [HALF, TILE]; paired [HALF, HALF]."""


def walk_states(
    step: Step,
    source: Callable[[Ref, Place], Ref],
    inputs: tuple[jax.Array, ...],
    output: jax.ShapeDtypeStruct,
    *,
    decays_width: int,
    name: str,
    walk: Walk,
    scale: float = 1.0,
    paired: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Runs a kernel of states.

    Args:
        step: what happens in a chunk.
        source: the vector of a chunk, from the reference of all decays.
        inputs: keys [B, T, H, K], values [B, T, H, V], decays; and if the state of every chunk is asked for those that
            enter the stretches [B, H, stretches, K, V].
        output: states of the summarized stretches [B, H, summarized, K, V], or of the chunks [B, H, chunks, K, V]; of
            paired heads [B, 2 H, *, HALF, HALF].
        decays_width: length of a chunk's vector.
        name: of the kernel.
        walk: the stretches.
        scale: factor on the states of the stretches.
        paired: see `tile.own_head`; decays are those of 2 H heads then.
        interpret: simulate the kernel.

    Returns:
        The states.
    """
    keys, values, *_ = inputs
    batch, _, heads, key_width = keys.shape
    is_traced = len(inputs) > 3
    count = tile.heads_per_tile(paired=paired)
    scratch = {
        "keys_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
        "values_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
        "decays_tile": plgpu.SMEM((_SLOTS, count, decays_width), jnp.float32),
        "fetched": plgpu.Barrier(num_arrivals=2 + count, num_barriers=_SLOTS),
        "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
    }
    if is_traced:
        scratch["state_tile"] = tile.bf16_tile(COMPUTING, HALF, HALF if paired else TILE)
    (states,) = launch(
        partial(_walk, step=step, source=source, walk=walk, scale=scale, paired=paired),
        inputs,
        (output,),
        scratch,
        name=name,
        stretches=walk.stretches if is_traced else len(walk.summarized),
        state=(batch, heads, key_width, values.shape[-1]),
        interpret=interpret,
    )
    return states


def _walk(
    keys: Ref,
    values: Ref,
    decays: Ref,
    *others: Ref,
    step: Step,
    source: Callable[[Ref, Place], Ref],
    walk: Walk,
    scale: float,
    paired: bool,
    keys_tile: Ref,
    values_tile: Ref,
    decays_tile: Ref,
    fetched: Ref,
    used: Ref,
    staging: Ref | None,
    state_tile: Ref | None = None,
) -> None:
    *entering, _, states = others
    batch, head, stretch = (lax.axis_index(name) for name in ("batch", "head", "stretch"))
    key_tile, warpgroup = lax.axis_index("key_tile"), lax.axis_index("warpgroup")
    of_values = pl.ds(lax.axis_index("value_tile") * TILE, TILE)
    if not entering:
        stretch += walk.summarized.start

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        def fetch(chunk: jax.Array, tokens: pl.Slice, slot: jax.Array) -> None:
            full, of_keys = fetched.at[slot], pl.ds(key_tile * TILE, TILE)
            for index, of_decays in enumerate(tile.heads_of(head, paired=paired)):
                place = Place(batch, of_decays, chunk, tokens, of_keys)
                plgpu.copy_gmem_to_smem(source(decays, place), decays_tile.at[slot, index], full)
            plgpu.copy_gmem_to_smem(keys.at[batch, tokens, head, of_keys], keys_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(values.at[batch, tokens, head, of_values], values_tile.at[slot], full)

        fetch_chunks(walk, stretch, fetch, used=used, slots=_SLOTS)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        own, stage = tile.half(warpgroup), stage_of(staging, warpgroup)
        of_states = tile.own_head(head, warpgroup, paired=paired)
        own_rows = tile.in_state(pl.ds(key_tile * TILE + warpgroup * HALF, HALF), paired=paired)
        columns = tile.in_state(of_values, paired=paired)

        def leave(chunk: jax.Array, state: jax.Array) -> None:
            own_state = state_tile.at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own_state[...] = state.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_state, states.at[batch, of_states, chunk, own_rows, columns])

        def step_body(index: jax.Array, state: jax.Array) -> jax.Array:
            slot = lax.rem(index, _SLOTS)
            memory = Fetched(
                keys_tile.at[slot, :, own],
                values_tile.at[slot, :, own] if paired else values_tile.at[slot],
                decays_tile.at[slot, warpgroup if paired else 0],
                fetched.at[slot],
                used.at[slot],
                stage,
            )
            return step(memory, state, partial(leave, walk.chunk(stretch, index)) if entering else None)

        if entering:
            state = tile.load_global(entering[0].at[batch, of_states, stretch, own_rows, columns])
        else:
            state = tile.zeros(HALF, HALF if paired else TILE)
        state = lax.fori_loop(0, walk.steps(stretch), step_body, state)
        if not entering:
            states[batch, of_states, stretch - walk.summarized.start, own_rows, columns] = state * scale
        plgpu.wait_smem_to_gmem(0)
