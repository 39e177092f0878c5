"""A kernel that visits the chunks of every head in order."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from zeco_jax.attention.tpu.tiling import Blocks, Tiling
from zeco_jax.attention.tpu.work import KERNELS
from zeco_jax.varying import match_varying


def walk_chunks(
    name: str,
    kernel: Callable[..., None],
    tiling: Tiling,
    inputs: Sequence[tuple[jax.Array, Blocks]],
    outputs: Sequence[tuple[Blocks, jnp.dtype]],
    *,
    reverse: bool,
    interpret: bool | pltpu.InterpretParams,
) -> list[jax.Array]:
    """Runs `kernel` on a grid of sequences, groups of heads and chunks; only chunks wait for one another.

    Args:
        name: of the kernel, one of `KERNELS`.
        kernel: takes a reference to a block of each input and output.
        tiling: the cut.
        inputs: arrays and their blocks.
        outputs: blocks and types of the results.
        reverse: visit the last chunk first.
        interpret: how to simulate the kernel, or False to compile it.
    """
    arrays = match_varying([array for array, _ in inputs])
    varying = jax.typeof(arrays[0]).manual_axis_type
    last = tiling.chunks - 1

    def spec(blocks: Blocks) -> pl.BlockSpec:
        place = blocks.place
        return pl.BlockSpec(blocks.block, (lambda b, h, n: place(b, h, last - n)) if reverse else place)

    results = [jax.ShapeDtypeStruct(blocks.shape, dtype, manual_axis_type=varying) for blocks, dtype in outputs]
    return pl.pallas_call(
        kernel,
        grid=tiling.grid,
        in_specs=[spec(blocks) for _, blocks in inputs],
        out_specs=[spec(blocks) for blocks, _ in outputs],
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiling.vmem_limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * KERNELS[name].products(tiling) * tiling.batch * tiling.heads * tiling.chunks,
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays)
            + sum(x.size * x.dtype.itemsize for x in results),
        ),
        interpret=interpret,
        name=f"linear_attention_{name}",
    )(*arrays)
