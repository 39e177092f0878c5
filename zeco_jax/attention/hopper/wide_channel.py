"""Decays per key channel and states of several tiles: what depends on keys alone is done once for all values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from zeco_jax.attention.hopper.channel import channel_gradients, strong_chunks
from zeco_jax.attention.hopper.decayed_keys import decayed_keys
from zeco_jax.attention.hopper.decayed_replay import decayed_replay
from zeco_jax.attention.hopper.decayed_scores import Decayed, decayed_scores
from zeco_jax.attention.hopper.decayed_states import decayed_chunk_states, decayed_stretch_states
from zeco_jax.attention.hopper.plan import stretches
from zeco_jax.attention.hopper.tile import TILE
from zeco_jax.attention.hopper.walk import Walk


class WideChannelDecays(NamedTuple):
    """Gates [B, T, H, K] float32, T a multiple of CHUNK, K of TILE; and whether the kernels are simulated."""

    gates: jax.Array
    interpret: bool

    @property
    def together(self) -> int:
        """Tiles of the values that all kernels take together."""
        return 1

    def stretch_states(
        self, keys: jax.Array, values: jax.Array, walk: Walk, scale: float = 1.0
    ) -> tuple[jax.Array, jax.Array]:
        """States that the stretches leave [B, H, stretches, K, V], and the chunks' gates [B, H, chunks, K]."""
        batch, _, heads, width = keys.shape
        keys_walk = Walk(walk.chunks, stretches(batch * heads * (width // TILE), walk.chunks), walk.reverse)
        decayed, totals = decayed_keys(keys, self.gates, walk=keys_walk, scale=scale, interpret=self.interpret)
        return decayed_stretch_states(decayed, values, totals, walk=walk, interpret=self.interpret), totals

    def chunk_states(
        self, k: jax.Array, v: jax.Array, totals: jax.Array, entering: jax.Array, walk: Walk, intra: Decayed
    ) -> jax.Array:
        """The states that enter the chunks, [B, H, chunks, K, V] bfloat16."""
        del k
        return decayed_chunk_states(intra.keys, v, totals, entering, walk=walk, interpret=self.interpret)

    def intra(self, q: jax.Array, k: jax.Array, totals: jax.Array, scale: float) -> Decayed:
        """What of the replay needs no state."""
        batch, _, heads, _ = q.shape
        chunks = totals.shape[2]
        walk = Walk(chunks, stretches(batch * heads, chunks))
        strong, some_strong = strong_chunks(totals, walk)
        any_strong = jnp.max(some_strong, axis=-1)
        return decayed_scores(q, k, self.gates, strong, any_strong, walk=walk, scale=scale, interpret=self.interpret)

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
        intra: Decayed | None = None,
        keep_states: bool = False,
    ) -> tuple[jax.Array, None]:
        """The outputs [B, T, H, V]; the chunks' states are computed again for the gradients."""
        del keep_states
        if intra is None:
            intra = self.intra(q, k, totals, scale)
        (out,) = decayed_replay(intra, v, totals, entering, walk=walk, interpret=self.interpret)
        return out, None

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
        intra: Decayed,
    ) -> tuple[jax.Array, ...]:
        """The gradients of q, k, v and the gates."""
        dv, cotangents = decayed_replay(intra, dout, totals, leaving, walk=walk, interpret=self.interpret)
        dq, dk, dgates = channel_gradients(
            q,
            k,
            v,
            self.gates,
            dout,
            totals,
            states,
            cotangents,
            scale=scale,
            interpret=self.interpret,
        )
        return dq, dk, dv, dgates
