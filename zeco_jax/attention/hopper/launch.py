"""How every kernel of this folder is launched: two computing warpgroups and one that fetches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.varying import varying_axes

# Of the 65536 registers of a multiprocessor: 2 x 128 threads with 240, 128 with 24.
COMPUTING_REGISTERS = 240
PRODUCER_REGISTERS = 24


def launch(
    body: Callable[..., None],
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    *,
    grid: Mapping[str, int],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Runs a kernel.

    Args:
        body: takes the references of inputs and outputs, and by name the scratch memory and `staging` (see
            `tile.products`).
        inputs: arrays in device memory.
        outputs: what the kernel writes.
        scratch: shared memory and barriers.
        grid: blocks of threads by the name of their axis; neighbours along the last one run side by side.
        interpret: simulate the kernel.

    Returns:
        The outputs.
    """
    axes = varying_axes(*inputs)
    outputs = [
        jax.ShapeDtypeStruct(output.shape, output.dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))
        if axes
        else output
        for output in outputs
    ]
    scratch = dict(scratch)
    if interpret:
        scratch["staging"] = tile.bf16_tile(tile.COMPUTING, tile.CHUNK, tile.CHUNK)
    kernel = plgpu.kernel(
        body if interpret else lambda *refs, **memory: body(*refs, **memory, staging=None),
        out_type=tuple(outputs),
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=tile.COMPUTING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return tuple(kernel(*inputs))


def stage_of(staging: Any, warpgroup: jax.Array) -> Any:
    """The staging memory of a warpgroup, where there is one."""
    return None if staging is None else staging.at[warpgroup]


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """An output in float32."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    """An output in bfloat16."""
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
