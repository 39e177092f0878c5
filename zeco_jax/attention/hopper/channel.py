"""Decays per key channel: the four kernels with what XLA does around them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from zeco_jax.attention.hopper.chunk_gradients import chunk_gradients
from zeco_jax.attention.hopper.plan import stretches
from zeco_jax.attention.hopper.replay_channel import replay_channel
from zeco_jax.attention.hopper.replayed import Replayed, States, only
from zeco_jax.attention.hopper.states import chunk_states, stretch_states
from zeco_jax.attention.hopper.tile import FACTORED_LIMIT, HALF, TILE
from zeco_jax.attention.hopper.walk import Walk


class ChannelDecays(NamedTuple):
    """Gates [B, T, H, TILE] float32, T a multiple of CHUNK; whether the kernels are simulated. V is TILE, too.

    With `paired` each of these heads is two, see `tile.own_head`.
    """

    gates: jax.Array
    interpret: bool
    paired: bool = False

    def stretch_states(
        self, keys: jax.Array, values: jax.Array, walk: Walk, scale: float = 1.0, intra: None = None
    ) -> tuple[jax.Array, jax.Array]:
        """States that summarized stretches leave [B, H, summarized, K, V], and their gates [B, H, summarized, K]."""
        del intra
        return stretch_states(keys, values, self.gates, walk=walk, scale=scale, **self._options)

    def chunk_states(
        self, k: jax.Array, v: jax.Array, entering: jax.Array, walk: Walk, intra: None = None
    ) -> jax.Array:
        """The states that enter the chunks, [B, H, chunks, K, V] bfloat16."""
        del intra
        return chunk_states(k, v, self.gates, entering, walk=walk, **self._options)[0]

    def intra(self, q: jax.Array, k: jax.Array, scale: float) -> None:
        """Nothing: the replay needs the state for all it does."""
        del q, k, scale

    def replay(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        entering: jax.Array,
        walk: Walk,
        scale: float,
        *,
        intra: None = None,
        keep_states: bool = False,
    ) -> Replayed:
        """The outputs, the chunks' states where they are to be kept, and the state that a closed walk ends with."""
        del intra
        outputs = replay_channel(
            q,
            k,
            v,
            self.gates,
            entering,
            walk=walk,
            scale=scale,
            keep_states=keep_states,
            **self._options,
        )
        return Replayed.of(outputs, walk)

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
        intra: None = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """The gradients of q, k, v and the gates, and the cotangent of a state that a closed walk ends with."""
        # Whoever writes the cotangents and whoever reads them decide by the same sums, bit for bit.
        del intra
        options = {"scale": scale, **self._options}
        cotangents, totals, *left = chunk_states(q, dout, self.gates, leaving, walk=walk, **options)
        gradients = channel_gradients(q, k, v, self.gates, dout, totals, states(), cotangents, **options)
        return gradients, only(left)

    @property
    def _options(self) -> dict[str, bool]:
        return {"paired": self.paired, "interpret": self.interpret}


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
    paired: bool = False,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The gradients of q, k, v (with states of one tile) and gates, from what is at the chunks' borders."""
    batch, _, heads, width = q.shape
    chunks = totals.shape[2]
    walk = Walk(chunks, stretches(batch * heads * (width // TILE), chunks))
    return chunk_gradients(
        q,
        k,
        v,
        gates,
        dout,
        totals,
        *strong_chunks(totals, walk),
        states,
        cotangents,
        walk=walk,
        scale=scale,
        paired=paired,
        interpret=interpret,
    )


def strong_chunks(totals: jax.Array, walk: Walk) -> tuple[jax.Array, jax.Array]:
    """What decays too strongly to be factored.

    Returns:
        Whether chunks do, by halves of tiles [B, H, chunks, K / HALF] int32; and the least of the chunks' gates in each
        stretch, [B, H, stretches, K].
    """
    by_half = jnp.min(totals.reshape(*totals.shape[:3], -1, HALF), axis=-1) < FACTORED_LIMIT
    return by_half.astype(jnp.int32), jnp.min(walk.by_stretch(totals), axis=3)
