"""What the fetching warpgroup does in every kernel: it keeps a few chunks ahead of the computing ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper.launch import PRODUCER_REGISTERS
from zeco_jax.attention.hopper.tile import CHUNK, Ref
from zeco_jax.attention.hopper.walk import Walk


def fetch_chunks(
    walk: Walk,
    stretch: jax.Array,
    fetch: Callable[[jax.Array, pl.Slice, jax.Array], None],
    *,
    used: Ref,
    slots: int,
) -> None:
    """Fetches the chunks of a stretch one after the other, each as soon as its slot has been read.

    Args:
        walk: the stretches.
        stretch: which one.
        fetch: starts the copies of a chunk; takes its number, its tokens and the slot to fill.
        used: barriers, one per slot, that the computing warpgroups arrive at when they have read it.
        slots: how many there are.
    """
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    steps = walk.steps(stretch)

    @pl.loop(0, steps)
    def _step(step: jax.Array) -> None:
        slot = lax.rem(step, slots)
        pl.when(step >= slots)(lambda: plgpu.barrier_wait(used.at[slot]))
        chunk = walk.chunk(stretch, step)
        fetch(chunk, pl.ds(chunk * CHUNK, CHUNK), slot)

    # A barrier may not go while somebody has still to pass it.
    @pl.loop(jnp.maximum(steps - slots, 0), steps)
    def _drain(step: jax.Array) -> None:
        plgpu.barrier_wait(used.at[lax.rem(step, slots)])
