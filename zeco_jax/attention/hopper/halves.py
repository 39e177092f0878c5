"""Scores of which each computing warpgroup has found the part of half of the channels."""

from functools import partial

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.tile import COMPUTING, Ref


def write_scores(
    part: jax.Array,
    parts: Ref,
    work: Ref,
    scores: Ref,
    warpgroup: jax.Array,
    *,
    scored: Ref,
    scores_read: Ref,
) -> None:
    """Adds the warpgroups' parts and writes the sum in two bfloat16 parts, each warpgroup one of them.

    Args:
        part: [CHUNK, CHUNK], this warpgroup's.
        parts: shared memory [COMPUTING, CHUNK, CHUNK] float32, free again after `scores_read`.
        work: shared memory [COMPUTING, CHUNK, CHUNK] bfloat16 on the way to device memory.
        scores: device memory [2, CHUNK, CHUNK] bfloat16.
        warpgroup: which one this is.
        scored: barrier for both warpgroups, that the parts are there.
        scores_read: barrier for both, that they have been read; the caller waits for it.
    """
    parts[warpgroup] = part
    plgpu.barrier_arrive(scored)
    plgpu.barrier_wait(scored)
    both = tile.split(part + tile.load(parts.at[1 - warpgroup]))
    plgpu.barrier_arrive(scores_read)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    own = work.at[warpgroup]
    for index in range(COMPUTING):
        pl.when(warpgroup == index)(partial(tile.write, own, both[index]))
    plgpu.copy_smem_to_gmem(own, scores.at[warpgroup])
