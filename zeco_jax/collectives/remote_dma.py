"""The chain as one Pallas kernel for TPUs: every rank copies updated blocks into the next rank's memory by itself.

Compiled for v5e, v5p and v6e, and simulated on the CPU with race detection; not run on a real TPU.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from zeco_jax.collectives.axis import AxisName, axis_index, axis_names, axis_size
from zeco_jax.collectives.maps import AffineMap
from zeco_jax.varying import cast_varying, match_varying

_LANES = 128
_SUBLANE_BYTES = 32
# Wider rows are cut, so that eight of them stay a small block.
_LARGEST_WIDTH = 1024
# Five blocks lie in VMEM at a time, of which a kernel gets 16 MiB by default on v5e and v5p.
_LARGEST_BLOCK_BYTES = 2 * 2**20
# A v5p core has 512 semaphores, and a block takes two.
_MOST_BLOCKS = 128


def remote_dma_scan(
    own: AffineMap,
    initial: jax.Array,
    axis_name: AxisName,
    *,
    blocks: int,
    reverse: bool,
    interpret: pltpu.InterpretParams | None = None,
) -> jax.Array:
    r"""The chain of `chain.chain_of_rows` as one kernel: remote DMA, one semaphore for each block.

    .. math:: E_0 = \text{initial}, \qquad E_{p+1} = \text{decay}_p \odot E_p + \text{state}_p

    A block of :math:`E_p` lands in its place in rank p's result and raises that block's semaphore. Rank p, which waits
    for it on the chip, computes the block of :math:`E_{p+1}` in VMEM and starts its copy to rank p + 1; while that is
    on its way it serves the next block. Neither the host nor the compiler's schedule stands between two hops. Only
    five blocks need room in VMEM, so states may be large.

    The kernel compiles for TPU v5e, v5p and v6e; it has been simulated on CPUs (every DMA order that the simulator
    offers, with race detection), but **not run on a real TPU**.

    Call it inside `jax.shard_map`. There is no gradient rule: `all_scan` has one, which calls the scan in reverse.

    Args:
        own: this rank's map, decay [R] and state [R, V]; float32 or bfloat16 on a TPU. bfloat16 is computed in float32
            and rounded once at each rank.
        initial: [R, V], what enters the first rank; other ranks' values are ignored.
        axis_name: mesh axis or tuple of axes, slowest first; coordinates on other axes of the mesh are kept.
        blocks: number of pipeline blocks, at most 128 (more are cut down). More are taken where a block would not fit
            VMEM (2 MiB), fewer where a block would have no full tile (8 rows in float32, 16 in bfloat16). V travels
            padded to a multiple of 128.
        reverse: pass the states from the last rank to the first.
        interpret: how to simulate the kernel; None simulates it on CPUs and compiles it for TPUs. A simulation has
            side effects, so `jax.checkpoint` refuses it.

    Returns:
        [R, V], the state that enters this rank, in the dtype of `own.state`.

    Raises:
        ValueError: if the axis is not in scope, the `shard_map` leaves out axes of the mesh, blocks < 1, or the state
            is larger than 128 blocks of 2 MiB.
        NotImplementedError: on anything but a TPU or a CPU.

    Reference: ZeCO, arXiv 2507.01004, section 3 (All-Scan).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> from zeco_jax.collectives.maps import AffineMap
        >>> from zeco_jax.collectives.remote_dma import remote_dma_scan
        >>> def local(decay, state):
        ...     own = AffineMap(decay, state)
        ...     return remote_dma_scan(own, jnp.zeros_like(state), "seq", blocks=1, reverse=False)
        >>> mesh = jax.make_mesh((4,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:4])
        >>> scan = jax.shard_map(local, mesh=mesh, in_specs=P("seq"), out_specs=P("seq"))
        >>> jax.jit(scan)(jnp.full((4,), 0.5), jnp.ones((4, 1))).ravel().tolist()
        [0.0, 1.0, 1.5, 1.75]
    """
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks}")
    if axis_size(axis_name) == 1:
        return initial
    mesh = jax.sharding.get_abstract_mesh()
    if others := set(mesh.axis_names) - set(mesh.manual_axes):
        raise ValueError(
            f"axis_name={axis_name!r}: the remote-DMA scan addresses devices by all axes of the mesh, expected a "
            f"jax.shard_map over all of them, got one without {sorted(others)}"
        )
    if interpret is None:
        interpret = _interpret_here()
    state = cast_varying(own.state, axis_names(axis_name))
    decay, state, initial = match_varying([own.decay, state, initial.astype(state.dtype)])

    @jax.custom_batching.custom_vmap
    def scan(decay: jax.Array, state: jax.Array, initial: jax.Array) -> jax.Array:
        return _scan_in_blocks(decay, state, initial, axis_name, blocks=blocks, reverse=reverse, interpret=interpret)

    @scan.def_vmap
    def _(size: int, batched: list[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        # A kernel in HBM has no batching rule and needs none: what is mapped over is more rows, which don't mix.
        full = [x if has else jnp.broadcast_to(x, (size, *x.shape)) for x, has in zip(arrays, batched, strict=True)]
        rows = [x.reshape(-1, *x.shape[2:]) for x in full]
        return scan(*rows).reshape(full[1].shape), True

    return scan(decay, state, initial)


def _scan_in_blocks(
    decay: jax.Array,
    state: jax.Array,
    initial: jax.Array,
    axis_name: AxisName,
    *,
    blocks: int,
    reverse: bool,
    interpret: pltpu.InterpretParams | bool,
) -> jax.Array:
    cut = _Cut.of(*state.shape, state.dtype.itemsize, blocks)
    decay = decay.astype(jnp.promote_types(state.dtype, jnp.float32))
    entering = _call_kernel(
        cut.decays(decay),
        cut.states(state),
        cut.states(initial),
        axis_name=axis_name,
        reverse=reverse,
        interpret=interpret,
    )
    return cut.restore(entering)


class _Cut(NamedTuple):
    """How states [rows, width] lie in blocks [blocks, block_rows, block_width] of whole tiles."""

    rows: int
    width: int
    pieces: int
    block_width: int
    blocks: int
    block_rows: int

    @classmethod
    def of(cls, rows: int, width: int, itemsize: int, blocks: int) -> "_Cut":
        """The cut that comes nearest to the number of blocks asked for."""
        pieces = -(-width // _LARGEST_WIDTH)
        block_width = _round_up(-(-width // pieces), _LANES)
        tile_rows = max(8, _SUBLANE_BYTES // itemsize)
        tiles = -(-rows * pieces // tile_rows)
        largest = max(1, _LARGEST_BLOCK_BYTES // (tile_rows * block_width * itemsize))
        block_tiles = min(-(-tiles // min(blocks, _MOST_BLOCKS)), largest)
        if -(-tiles // block_tiles) > _MOST_BLOCKS:
            raise ValueError(
                f"own.state of {rows} x {width} is too large for the remote-DMA scan: expected at most {_MOST_BLOCKS} "
                f"blocks of {_LARGEST_BLOCK_BYTES} bytes on each rank"
            )
        return cls(rows, width, pieces, block_width, -(-tiles // block_tiles), block_tiles * tile_rows)

    def states(self, x: jax.Array) -> jax.Array:
        """[rows, width] -> [blocks, block_rows, block_width]."""
        x = _pad(x, 1, self.pieces * self.block_width).reshape(-1, self.block_width)
        return _pad(x, 0, self.blocks * self.block_rows).reshape(self.blocks, self.block_rows, self.block_width)

    def decays(self, x: jax.Array) -> jax.Array:
        """[rows] -> [blocks, tiles, 128]: a decay in each lane, for up to 128 rows of the block in each tile."""
        x = _pad(jnp.repeat(x, self.pieces), 0, self.blocks * self.block_rows).reshape(self.blocks, self.block_rows)
        return _pad(x, 1, _round_up(self.block_rows, _LANES)).reshape(self.blocks, -1, _LANES)

    def restore(self, x: jax.Array) -> jax.Array:
        """[blocks, block_rows, block_width] -> [rows, width]."""
        x = x.reshape(-1, self.block_width)[: self.rows * self.pieces]
        return x.reshape(self.rows, -1)[:, : self.width]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    missing = size - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def _interpret_here() -> pltpu.InterpretParams | bool:
    """What the devices of the mesh in scope need, which are not this process's when compiling for a pod."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    if platform == "tpu":
        return False
    if platform == "cpu":
        return pltpu.InterpretParams()
    raise NotImplementedError(
        f"the remote-DMA scan is a kernel for TPUs (simulated on CPUs), the mesh is on platform {platform!r}: choose "
        'another schedule, such as "chain"'
    )


def _call_kernel(
    decay: jax.Array,
    own: jax.Array,
    initial: jax.Array,
    *,
    axis_name: AxisName,
    reverse: bool,
    interpret: pltpu.InterpretParams | bool,
) -> jax.Array:
    blocks, *block_shape = own.shape
    # A rank that has finished may signal for its next call while a neighbour is still at the barrier of this one. That
    # is harmless between calls with the same neighbours, so calls with others must not share the semaphore.
    mesh = jax.sharding.get_abstract_mesh()
    tag = ("zeco_jax.remote_dma_scan", tuple(mesh.shape.items()), axis_name, reverse)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        # The simulator knows no tags, and clears its semaphores after each call.
        partial(_scan_kernel, mesh_axes=mesh.axis_names, barrier_tag=None if interpret else tag),
        out_shape=jax.ShapeDtypeStruct(own.shape, own.dtype, manual_axis_type=jax.typeof(own).manual_axis_type),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.VMEM), whole, whole],
        out_specs=whole,
        scratch_shapes=[
            pltpu.VMEM((2, *block_shape), own.dtype),
            pltpu.VMEM(tuple(block_shape), own.dtype),
            pltpu.VMEM((2, *block_shape), own.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA(()),
            pltpu.SemaphoreType.DMA((blocks,)),
            pltpu.SemaphoreType.DMA((blocks,)),
        ],
        compiler_params=pltpu.CompilerParams(collective_id=0 if interpret else None),
        cost_estimate=pl.CostEstimate(
            flops=2 * math.prod(own.shape),
            transcendentals=0,
            bytes_accessed=4 * own.size * own.dtype.itemsize,
            remote_bytes_transferred=own.size * own.dtype.itemsize,
        ),
        interpret=interpret,
        name="remote_dma_scan",
    )(_neighbours(axis_name, reverse=reverse), decay, own, initial)


def _neighbours(axis_name: AxisName, *, reverse: bool) -> jax.Array:
    """[2, 1 + axes of the mesh] int32: whether there is a previous and a next place in the scan, and its coordinates.

    Computed outside the kernel: under check_vma neither the simulator nor the compiler takes an axis index inside it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    ranks, step = axis_size(axis_name), -1 if reverse else 1
    entries = []
    for neighbour in (axis_index(axis_name) - step, axis_index(axis_name) + step):
        # Where there is none the coordinates are this rank's, which every descriptor may name.
        rank = jnp.clip(neighbour, 0, ranks - 1)
        entries.append(rank == neighbour)
        along, slower = {}, rank
        for name in reversed(names):
            slower, along[name] = jax.lax.div(slower, axis_size(name)), jax.lax.rem(slower, axis_size(name))
        entries.extend(along[name] if name in along else axis_index(name) for name in mesh.axis_names)
    return jnp.stack(match_varying([entry.astype(jnp.int32) for entry in entries])).reshape(2, -1)


def _scan_kernel(
    neighbours,  # noqa: ANN001
    decay,  # noqa: ANN001
    own,  # noqa: ANN001
    initial,  # noqa: ANN001
    entering,  # noqa: ANN001
    own_buffer,  # noqa: ANN001
    entering_buffer,  # noqa: ANN001
    leaving_buffer,  # noqa: ANN001
    own_loaded,  # noqa: ANN001
    entering_loaded,  # noqa: ANN001
    sent,  # noqa: ANN001
    received,  # noqa: ANN001
    *,
    mesh_axes: tuple[str, ...],
    barrier_tag: tuple | None,
) -> None:
    blocks = own.shape[0]
    previous, following = ({name: neighbours[i, 1 + axis] for axis, name in enumerate(mesh_axes)} for i in range(2))
    first, passes_on = neighbours[0, 0] == 0, neighbours[1, 0] == 1

    def enter(block: jax.Array) -> Any:
        return pltpu.make_async_copy(initial.at[block], entering.at[block], received.at[block])

    def load_own(block: jax.Array) -> Any:
        slot = jax.lax.rem(block, 2)
        return pltpu.make_async_copy(own.at[block], own_buffer.at[slot], own_loaded.at[slot])

    def send(block: jax.Array) -> Any:
        return pltpu.make_async_remote_copy(
            leaving_buffer.at[jax.lax.rem(block, 2)],
            entering.at[block],
            sent.at[block],
            received.at[block],
            device_id=following,
        )

    barrier = pltpu.get_barrier_semaphore(barrier_tag)

    @pl.when(first)
    def _() -> None:
        jax.lax.fori_loop(0, blocks, lambda block, _: enter(block).start(), None)

    # Only the rank that writes into another's memory must know that the other has begun.
    @pl.when(jnp.logical_not(first))
    def _() -> None:
        pl.semaphore_signal(barrier, device_id=previous)

    @pl.when(passes_on)
    def _() -> None:
        load_own(0).start()
        pl.semaphore_wait(barrier)

    def pass_on(block: jax.Array) -> None:
        load_entering = pltpu.make_async_copy(entering.at[block], entering_buffer, entering_loaded)
        load_entering.start()

        @pl.when(block + 1 < blocks)
        def _() -> None:
            load_own(block + 1).start()

        @pl.when(block >= 2)
        def _() -> None:
            send(block - 2).wait_send()

        load_own(block).wait()
        load_entering.wait()
        _update(decay, own_buffer, entering_buffer, leaving_buffer, block)
        send(block).start()

    def serve(block: jax.Array, _: None) -> None:
        pl.when(first)(lambda: enter(block).wait())
        pl.when(jnp.logical_not(first))(lambda: send(block).wait_recv())
        pl.when(passes_on)(lambda: pass_on(block))

    jax.lax.fori_loop(0, blocks, serve, None)

    @pl.when(passes_on)
    def _() -> None:
        for block in range(max(0, blocks - 2), blocks):
            send(block).wait_send()


def _update(decay, own_buffer, entering_buffer, leaving_buffer, block: jax.Array) -> None:  # noqa: ANN001
    """One block of the state that leaves this rank."""
    slot = jax.lax.rem(block, 2)

    def update(tile: jax.Array | int, rows: int) -> None:
        # Decays lie along lanes, where they take a 128th of the room, and are wanted along sublanes.
        along_lanes = decay[block, pl.ds(tile, 1), :]
        factor = jnp.broadcast_to(along_lanes, (_LANES, _LANES)).T[:rows, :1]
        here = pl.ds(tile * _LANES, rows)
        state_in, state = entering_buffer[here, :], own_buffer[slot, here, :]
        leaving_buffer[slot, here, :] = (factor * state_in + state).astype(leaving_buffer.dtype)

    full, rest = divmod(entering_buffer.shape[0], _LANES)
    jax.lax.fori_loop(0, full, lambda tile, _: update(tile, _LANES), None)
    if rest:
        update(full, rest)
