"""Kernel: keys decayed to the end of their chunk, for a decay per key channel."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.fetching import fetch_chunks
from zeco_jax.attention.hopper.launch import COMPUTING_REGISTERS, bfloat16, float32, launch, stage_of
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

_SLOTS = 3


def decayed_keys(
    keys: jax.Array, gates: jax.Array, *, walk: Walk, scale: float = 1.0, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    r"""The keys as they add to the state of their chunk's end, and by how much every chunk decays a state.

    .. math:: \text{scale}\; e^{d_t} \odot k_t

    with :math:`d_t` the sum of the gates after token t in its chunk (forward: keys) or of those up to and including its
    own (reverse: queries). Where many tiles of values meet the same keys, each reads these instead of the gates.

    Args:
        keys: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        gates: [B, T, H, K] float32.
        walk: which chunks a block of threads takes, and which way the states will go.
        scale: factor on the keys.
        interpret: simulate the kernel.

    Returns:
        [B, T, H, K] bfloat16 and the sums of the gates of every chunk [B, H, chunks, K] float32.
    """
    batch, _, heads, width = keys.shape
    return launch(
        partial(_decay, walk=walk, scale=scale),
        (keys, gates),
        (bfloat16(*keys.shape), float32(batch, heads, walk.chunks, width)),
        {
            "keys_tile": tile.bf16_tile(_SLOTS, CHUNK, TILE),
            "gates_tile": tile.fp32_tile(_SLOTS, CHUNK, TILE),
            "pair": tile.bf16_tile(COMPUTING, 2, CHUNK, HALF),
            # Which gates decay each token.
            "weights": tile.bf16_tile(CHUNK, CHUNK),
            "ones": tile.bf16_tile(CHUNK, CHUNK),
            "decayed_tile": tile.bf16_tile(COMPUTING, CHUNK, HALF),
            "fetched": plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
            "used": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=_SLOTS),
        },
        name="decayed_keys",
        stretches=walk.stretches,
        state=(batch, heads, width, TILE),
        interpret=interpret,
    )


def _decay(
    keys: Ref,
    gates: Ref,
    nothing: Ref,
    decayed: Ref,
    totals: Ref,
    *,
    walk: Walk,
    scale: float,
    keys_tile: Ref,
    gates_tile: Ref,
    pair: Ref,
    weights: Ref,
    ones: Ref,
    decayed_tile: Ref,
    fetched: Ref,
    used: Ref,
    staging: Ref | None,
) -> None:
    del nothing
    batch, head, stretch, key_tile = (lax.axis_index(name) for name in ("batch", "head", "stretch", "key_tile"))
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        def fetch(chunk: jax.Array, tokens: pl.Slice, slot: jax.Array) -> None:
            del chunk
            full, of_keys = fetched.at[slot], pl.ds(key_tile * TILE, TILE)
            plgpu.copy_gmem_to_smem(gates.at[batch, tokens, head, of_keys], gates_tile.at[slot], full)
            plgpu.copy_gmem_to_smem(keys.at[batch, tokens, head, of_keys], keys_tile.at[slot], full)

        fetch_chunks(walk, stretch, fetch, used=used, slots=_SLOTS)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        own, stage = tile.half(warpgroup), stage_of(staging, warpgroup)
        own_pair, own_decayed = pair.at[warpgroup], decayed_tile.at[warpgroup]
        own_keys = pl.ds(key_tile * TILE + warpgroup * HALF, HALF)
        rows, columns = tile.indices()
        # In memory: ptxas 13.0 sets registers of constant weights after the product that reads them.
        # Both warpgroups write the same.
        weights[...] = tile.ones_where(columns <= rows if walk.reverse else columns > rows)
        ones[...] = tile.ones_where(rows >= 0)

        @pl.loop(0, walk.steps(stretch))
        def _step(step: jax.Array) -> None:
            slot = lax.rem(step, _SLOTS)
            chunk = walk.chunk(stretch, step)
            plgpu.barrier_wait(fetched.at[slot])
            tile.write_split(own_pair, jnp.maximum(tile.load(gates_tile.at[slot, :, own]), tile.WEAKEST_GATE))
            plgpu.commit_smem()
            decays, total = tile.products(
                ((CHUNK, HALF), [(weights, own_pair.at[i]) for i in range(2)]),
                ((HALF, CHUNK), [(own_pair.at[i].transpose((1, 0)), ones) for i in range(2)]),
                staging=stage,
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            own_decayed[...] = (tile.load(keys_tile.at[slot, :, own]) * tile.scaled_exp(decays, scale)).astype(
                jnp.bfloat16
            )
            plgpu.barrier_arrive(used.at[slot])
            plgpu.commit_smem()
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(own_decayed, decayed.at[batch, tokens, head, own_keys])
            # Every column is the same.
            totals[batch, head, chunk, own_keys] = jnp.max(total, axis=1)

        plgpu.wait_smem_to_gmem(0)
