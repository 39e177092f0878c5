"""Decays per key channel and states of several tiles: what depends on keys alone is done once for all values."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from zeco_jax.attention.hopper.channel import channel_gradients
from zeco_jax.attention.hopper.decayed_keys import decayed_keys
from zeco_jax.attention.hopper.decayed_replay import Decayed, decayed_replay
from zeco_jax.attention.hopper.decayed_scores import decayed_scores
from zeco_jax.attention.hopper.decayed_states import decayed_chunk_states, decayed_stretch_states
from zeco_jax.attention.hopper.exact_scores import exact_scores
from zeco_jax.attention.hopper.plan import stretches
from zeco_jax.attention.hopper.replayed import Replayed, States, only
from zeco_jax.attention.hopper.tile import CHUNK, FACTORED_LIMIT, TILE
from zeco_jax.attention.hopper.walk import Walk


class WideChannelDecays(NamedTuple):
    """Gates [B, T, H, K] float32, T a multiple of CHUNK, K of TILE; and whether the kernels are simulated."""

    gates: jax.Array
    interpret: bool

    def stretch_states(
        self, keys: jax.Array, values: jax.Array, walk: Walk, scale: float = 1.0, intra: Decayed | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """States that summarized stretches leave [B, H, summarized, K, V], and their gates [B, H, summarized, K]."""
        if intra is None:
            batch, _, heads, width = keys.shape
            keys_walk = Walk(walk.chunks, stretches(batch * heads * (width // TILE), walk.chunks), walk.reverse)
            decayed, totals = decayed_keys(keys, self.gates, walk=keys_walk, scale=scale, interpret=self.interpret)
        else:
            decayed, totals = intra.queries if walk.reverse else intra.keys, intra.totals
        states = decayed_stretch_states(decayed, values, totals, walk=walk, interpret=self.interpret)
        return states, walk.summed(totals)

    def chunk_states(self, k: jax.Array, v: jax.Array, entering: jax.Array, walk: Walk, intra: Decayed) -> jax.Array:
        """The states that enter the chunks, [B, H, chunks, K, V] bfloat16."""
        del k
        return decayed_chunk_states(intra.keys, v, intra.totals, entering, walk=walk, interpret=self.interpret)

    def intra(self, q: jax.Array, k: jax.Array, scale: float) -> Decayed:
        """What of the replay needs no state."""
        batch, chunks, heads = q.shape[0], q.shape[1] // CHUNK, q.shape[2]
        walk = Walk(chunks, stretches(batch * heads, chunks))
        options = {"walk": walk, "scale": scale, "interpret": self.interpret}
        queries, keys, totals, scores = decayed_scores(q, k, self.gates, **options)
        strong = (jnp.min(totals, axis=-1) < FACTORED_LIMIT).astype(jnp.int32)
        some_strong = jnp.max(walk.by_stretch(strong), axis=-1)
        strong_scores = exact_scores(q, k, self.gates, strong, some_strong, **options)
        return Decayed(queries, keys, totals, scores, strong, strong_scores)

    def replay(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        entering: jax.Array,
        walk: Walk,
        scale: float,
        *,
        intra: Decayed | None = None,
        keep_states: bool = False,
    ) -> Replayed:
        """The outputs, and the state that a closed walk ends with; chunks' states are computed again."""
        del keep_states
        if intra is None:
            intra = self.intra(q, k, scale)
        return Replayed(*decayed_replay(intra, v, entering, walk=walk, interpret=self.interpret))

    def gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        dout: jax.Array,
        states: States,
        leaving: jax.Array,
        walk: Walk,
        scale: float,
        intra: Decayed,
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """The gradients of q, k, v and the gates, and the cotangent of a state that a closed walk ends with."""
        dv, *left, cotangents = decayed_replay(intra, dout, leaving, walk=walk, interpret=self.interpret)
        dq, dk, dgates = channel_gradients(
            q,
            k,
            v,
            self.gates,
            dout,
            intra.totals,
            # After the cotangents, so that these are all that is held beside the scores.
            states(cotangents),
            cotangents,
            scale=scale,
            interpret=self.interpret,
        )
        return (dq, dk, dv, dgates), only(left)
