"""The chain: ZeCO's All-Scan, states passed from rank to rank in pipelined blocks (arXiv 2507.01004, section 3)."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from zeco_jax.collectives.axis import AxisName, axis_index, axis_size

# One hop of XLA's ppermute over NVLink, measured on two H200s: seconds of latency and bytes per second.
HOP_LATENCY = 25e-6
HOP_BANDWIDTH = 224e9


def chain_blocks(state_bytes: int, rows: int, ranks: int) -> int:
    """Number of pipeline blocks that makes the chain fastest, as a divisor of the state's rows.

    A chain of P ranks and K blocks takes `(P - 2 + K) (a + B / (K w))` for B bytes, latency a and bandwidth w a hop;
    the minimum is at `K = sqrt((P - 2) B / (w a))`.
    """
    best = math.sqrt(max(ranks - 2, 0) * state_bytes / (HOP_BANDWIDTH * HOP_LATENCY))
    divisors = [blocks for blocks in range(1, rows + 1) if rows % blocks == 0]
    return min(divisors, key=lambda blocks: abs(math.log(blocks / max(best, 1.0))))


def chain_scan(
    state: jax.Array, decay: jax.Array, initial: jax.Array, axis_name: AxisName, *, blocks: int | None, reverse: bool
) -> jax.Array:
    """Exclusive scan of affine maps along the ranks: at step s rank p sends block s - p, updated, to rank p + 1.

    Each rank sends and receives every block once, so one state crosses each link, whatever P is.

    Args:
        state: [R, V], what this rank adds; R rows on which the decay acts one by one.
        decay: [R], what this rank multiplies the entering state by.
        initial: [R, V], what enters the first rank (the last one with `reverse`); other ranks' values are ignored.
        axis_name: mesh axis or tuple of axes.
        blocks: number of blocks, at most R (more are cut down to R); None chooses.
        reverse: pass the states from the last rank to the first.

    Returns:
        [R, V], the state that enters this rank.
    """
    ranks = axis_size(axis_name)
    rows, width = state.shape
    rank = axis_index(axis_name)
    # The chain's position: 0 is where it begins, in either direction.
    position = ranks - 1 - rank if reverse else rank
    entering = jnp.where(position == 0, initial, 0)
    if ranks == 1:
        return entering
    if blocks is None:
        blocks = chain_blocks(state.nbytes, rows, ranks)
    blocks = min(blocks, rows)
    block_rows = -(-rows // blocks)
    padding = blocks * block_rows - rows

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)) if padding else x
        return padded.reshape(blocks, block_rows, *x.shape[1:])

    state, decay, entering = cut(state), cut(decay), cut(entering)
    for step in range(ranks - 2 + blocks):
        # Only positions that hold a finished block send; nobody ships filler.
        senders = [sender for sender in range(ranks - 1) if 0 <= step - sender < blocks]
        pairs = [(ranks - 1 - s, ranks - 2 - s) if reverse else (s, s + 1) for s in senders]
        block = partial(jax.lax.dynamic_index_in_dim, index=jnp.clip(step - position, 0, blocks - 1), keepdims=False)
        leaving = block(decay)[:, None] * block(entering) + block(state)
        arrived = jax.lax.ppermute(leaving, axis_name, pairs)
        # Ranks that nobody sends to in this step get zeros, which add nothing wherever they land.
        entering = entering.at[jnp.clip(step - position + 1, 0, blocks - 1)].add(arrived)
    return entering.reshape(blocks * block_rows, width)[:rows]
