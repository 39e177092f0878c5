"""Scalar decays, per token and head or per head, and states of one tile: the kernels with what XLA does around them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from zeco_jax.attention.hopper.gradients_scalar import gate_gradient, gradients_scalar
from zeco_jax.attention.hopper.replay_scalar import replay_scalar
from zeco_jax.attention.hopper.replayed import Replayed, States, only
from zeco_jax.attention.hopper.states_scalar import chunk_states_scalar, stretch_states_scalar
from zeco_jax.attention.hopper.tile import CHUNK, WEAKEST_GATE
from zeco_jax.attention.hopper.walk import Walk


class ScalarDecays(NamedTuple):
    """The gates' sums since each chunk began, [B or 1, H, T] float32; and whether the kernels are simulated.

    With `paired` the heads of keys and values are two each, see `tile.own_head`.
    """

    sums: jax.Array
    interpret: bool
    paired: bool = False

    @classmethod
    def of(cls, gates: jax.Array, interpret: bool, paired: bool = False) -> "ScalarDecays":
        """From gates [B or 1, T, H, 1], any T: those that are missing to a whole chunk don't decay."""
        gates = jnp.moveaxis(jnp.maximum(gates[..., 0], WEAKEST_GATE), 1, 2)
        gates = jnp.pad(gates, ((0, 0), (0, 0), (0, -gates.shape[2] % CHUNK)))
        chunks = gates.reshape(*gates.shape[:2], -1, CHUNK)
        return cls(jnp.cumsum(chunks, axis=-1).reshape(gates.shape), interpret, paired)

    def stretch_states(
        self, keys: jax.Array, values: jax.Array, walk: Walk, scale: float = 1.0, intra: None = None
    ) -> tuple[jax.Array, jax.Array]:
        """States that summarized stretches leave [B, H, summarized, K, V], their gates [B or 1, H, summarized, 1]."""
        del intra
        states = stretch_states_scalar(keys, values, self.sums, walk=walk, scale=scale, **self._options)
        return states, walk.summed(self.sums[..., CHUNK - 1 :: CHUNK, None])

    def chunk_states(
        self, k: jax.Array, v: jax.Array, entering: jax.Array, walk: Walk, intra: None = None
    ) -> jax.Array:
        """The states that enter the chunks, [B, H, chunks, K, V] bfloat16."""
        del intra
        return chunk_states_scalar(k, v, self.sums, entering, walk=walk, **self._options)

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
        options = {"walk": walk, "scale": scale, "keep_states": keep_states, **self._options}
        return Replayed.of(replay_scalar(q, k, v, self.sums, entering, **options), walk)

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
        dq, dk, dv, z, u, w, x, *left = gradients_scalar(
            q, k, v, self.sums, dout, states(), leaving, walk=walk, scale=scale, **self._options
        )
        return (dq, dk, dv, gate_gradient(z, u, w, x)), only(left)

    @property
    def _options(self) -> dict[str, bool]:
        return {"paired": self.paired, "interpret": self.interpret}
