"""Scalar decays and states of several tiles: the gradients of the values are a replay in reverse."""

from typing import Any

import jax

from zeco_jax.attention.hopper.chunk_gradients_scalar import chunk_gradients_scalar
from zeco_jax.attention.hopper.gradients_scalar import gate_gradient
from zeco_jax.attention.hopper.plan import stretches
from zeco_jax.attention.hopper.replay_scalar import replay_scalar
from zeco_jax.attention.hopper.replayed import Replayed, States, only
from zeco_jax.attention.hopper.scalar import ScalarDecays
from zeco_jax.attention.hopper.tile import TILE
from zeco_jax.attention.hopper.walk import Walk


class WideScalarDecays(ScalarDecays):
    """As `ScalarDecays`; the chunks' states, larger than all else, are computed again instead of kept."""

    def replay(self, *arguments: Any, keep_states: bool = False, **options: Any) -> Replayed:
        """The outputs, and the state that a closed walk ends with."""
        del keep_states
        return super().replay(*arguments, **options)

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
        """The gradients of q, k, v and the gates [B, T, H, 1], and that of a state that a closed walk ends with."""
        del intra
        options = {"scale": scale, "interpret": self.interpret}
        dv, *left, cotangents = replay_scalar(q, k, dout, self.sums, leaving, walk=walk, keep_states=True, **options)
        batch, _, heads, width = q.shape
        walk = Walk(walk.chunks, stretches(batch * heads * (width // TILE), walk.chunks))
        # The states last: both they and their cotangents are large.
        dq, dk, *gate_parts = chunk_gradients_scalar(
            q, k, v, self.sums, dout, states(cotangents), cotangents, walk=walk, **options
        )
        return (dq, dk, dv, gate_gradient(*gate_parts)), only(left)
