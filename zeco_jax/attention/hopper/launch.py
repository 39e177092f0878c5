"""How every kernel of this folder is launched: two computing warpgroups and one that fetches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.walk import Walk
from zeco_jax.varying import match_varying

# Of the 65536 registers of a multiprocessor: 2 x 128 threads with 240, 128 with 24.
COMPUTING_REGISTERS = 240
PRODUCER_REGISTERS = 24


def launch(
    body: Callable[..., None],
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    *,
    name: str,
    stretches: int,
    state: tuple[int, int, int, int],
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Runs a kernel.

    Args:
        body: takes the references of inputs, of a `nothing` and of outputs, and by name the scratch memory and
            `staging` (see `tile.products`). `nothing[0]` is a zero that the compiler doesn't know, see `hidden_zero`.
            The warps of a warpgroup wait for each other in `commit_smem` and `wait_smem_to_gmem`, and at barriers. One
            of these belongs between a product, or a load in another layout, and a store to what it read; and one of
            the first two between a store and whoever reads it, other than each thread what it wrote. Where both
            warpgroups write the same to one place, each waits for its own warps, and finds the same whoever was last.
        inputs: arrays in device memory.
        outputs: what the kernel writes.
        scratch: shared memory and barriers.
        name: of the kernel.
        stretches: how many; each is walked by a block of threads for each tile of the state.
        state: the shape of the state, [B, H, K, V], K and V multiples of TILE; H counts a pair of heads as one.
        interpret: simulate the kernel.

    Returns:
        The outputs.
    """
    nothing, *inputs = match_varying([jnp.zeros(1, jnp.int32), *inputs])
    batch, heads, key_width, value_width = state
    # Blocks next to each other along the last axis run side by side: they read the same keys and gates.
    grid = {
        "batch": batch,
        "head": heads,
        "stretch": stretches,
        "key_tile": key_width // tile.TILE,
        "value_tile": value_width // tile.TILE,
    }
    scratch = dict(scratch)
    if interpret:
        scratch["staging"] = tile.bf16_tile(tile.COMPUTING, tile.CHUNK, tile.CHUNK)

    def named(*refs: Any, **memory: Any) -> None:
        body(*refs, **{"staging": None, **memory})

    # What a profile shows.
    named.__name__ = name
    kernel = plgpu.kernel(
        named,
        out_type=tuple(outputs),
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=tile.COMPUTING + 1,
        thread_name="warpgroup",
        # Reductions across warps are to a single number, and of the fetching warpgroup alone.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=16, unsafe_no_auto_barriers=True
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    # What a kernel returns varies over no mesh axis, so far.
    return tuple(match_varying([nothing, *kernel(*inputs, nothing)])[1:])


def stage_of(staging: Any, warpgroup: jax.Array) -> Any:
    """The staging memory of a warpgroup, where there is one."""
    return None if staging is None else staging.at[warpgroup]


def hidden_zero(step: jax.Array) -> jax.Array:
    """Zero in every step of a loop to `steps + nothing[0]`, which the compiler can't know.

    What it is added to, masks and places in memory, is computed where it is needed; else the compiler computes all of
    them before the loop and keeps them in registers, which are too few for it.
    """
    return lax.shift_right_logical(step, 24)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """An output in float32."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    """An output in bfloat16."""
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def left_state(walk: Walk, *shape: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The state that a closed walk ends with, as an output of kernels that replay it."""
    return (float32(*shape),) if walk.closed else ()
