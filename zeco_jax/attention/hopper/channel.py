"""Decays per key channel: the four kernels with what XLA does around them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from zeco_jax.attention.hopper.chunk_gradients import chunk_gradients
from zeco_jax.attention.hopper.plan import stretches
from zeco_jax.attention.hopper.replay_channel import replay_channel
from zeco_jax.attention.hopper.states import chunk_states, stretch_states
from zeco_jax.attention.hopper.tile import COMPUTING, FACTORED_LIMIT, HALF, TILE
from zeco_jax.attention.hopper.walk import Walk


class ChannelDecays(NamedTuple):
    """Gates [B, T, H, K] float32, T a multiple of CHUNK, K of TILE; and whether the kernels are simulated.

    The kernel of the stretches' states takes so many tiles of the values `together`, one or two.
    """

    gates: jax.Array
    interpret: bool
    together: int

    def stretch_states(
        self, keys: jax.Array, values: jax.Array, walk: Walk, scale: float = 1.0
    ) -> tuple[jax.Array, jax.Array]:
        """States that the stretches leave [B, H, stretches, K, V], and the chunks' gates [B, H, chunks, K]."""
        return stretch_states(
            keys, values, self.gates, walk=walk, scale=scale, together=self.together, interpret=self.interpret
        )

    def chunk_states(
        self, k: jax.Array, v: jax.Array, totals: jax.Array, entering: jax.Array, walk: Walk, intra: None = None
    ) -> jax.Array:
        """The states that enter the chunks, [B, H, chunks, K, V] bfloat16."""
        del totals, intra
        return chunk_states(k, v, self.gates, entering, walk=walk, interpret=self.interpret)

    def intra(self, q: jax.Array, k: jax.Array, totals: jax.Array, scale: float) -> None:
        """Nothing: the replay needs the state for all it does."""
        del q, k, totals, scale

    def replay(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        totals: jax.Array,
        entering: jax.Array,
        walk: Walk,
        scale: float,
        *,
        intra: None = None,
        keep_states: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The outputs [B, T, H, V], and the chunks' states where they are to be kept."""
        del intra
        # Wider states cost more than they save where rematerialisation runs the replay twice, see NOTES.md.
        keep_states = keep_states and max(q.shape[-1], v.shape[-1]) == TILE
        out, *states = replay_channel(
            q,
            k,
            v,
            self.gates,
            totals,
            *strong_chunks(totals, walk),
            entering,
            walk=walk,
            scale=scale,
            keep_states=keep_states,
            interpret=self.interpret,
        )
        return out, states[0] if states else None

    def gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        dout: jax.Array,
        totals: jax.Array,
        states: jax.Array,
        leaving: jax.Array,
        walk: Walk,
        scale: float,
        intra: None = None,
    ) -> tuple[jax.Array, ...]:
        """The gradients of q, k, v and the gates, for states of one tile."""
        del intra
        cotangents = chunk_states(q, dout, self.gates, leaving, walk=walk, scale=scale, interpret=self.interpret)
        return channel_gradients(
            q, k, v, self.gates, dout, totals, states, cotangents, scale=scale, interpret=self.interpret
        )


def channel_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    dout: jax.Array,
    totals: jax.Array,
    states: jax.Array,
    cotangents: jax.Array,
    *,
    scale: float,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The gradients of q, k, v (with states of one tile) and gates, from what is at the chunks' borders."""
    batch, _, heads, width = q.shape
    chunks = totals.shape[2]
    walk = Walk(chunks, stretches(batch * heads * (width // TILE), chunks))
    strong = strong_chunks(totals, walk)
    return chunk_gradients(
        q,
        k,
        v,
        gates,
        dout,
        totals,
        *strong,
        states,
        cotangents,
        walk=walk,
        scale=scale,
        interpret=interpret,
    )


def strong_chunks(totals: jax.Array, walk: Walk) -> tuple[jax.Array, jax.Array]:
    """Which chunks decay too strongly to be factored, by half tiles of channels, and which stretches have any."""
    batch, heads, chunks, width = totals.shape
    by_chunk = jnp.min(totals.reshape(batch, heads, chunks, width // HALF, HALF), axis=-1) < FACTORED_LIMIT
    by_stretch = jnp.any(walk.by_stretch(by_chunk).reshape(batch, heads, walk.stretches, -1, COMPUTING), axis=-1)
    return by_chunk.astype(jnp.int32), by_stretch.astype(jnp.int32)
