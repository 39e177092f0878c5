"""Decays of one gate per token and key channel: what all ways to apply them have in common."""

import math
from functools import cached_property

import jax
import jax.numpy as jnp

from zeco_jax.attention.tpu.products import product
from zeco_jax.attention.tpu.running_sums import sums_after, sums_to


class ChannelDecay:
    r"""What one chunk of one head does to a state, with :math:`b_i` the sum of gates up to token i.

    .. math:: S' = e^{b_C} \odot S + (e^{b_C - b} \odot K)^\top V

    States are transposed, [V, K].
    """

    def __init__(self, gates: jax.Array, scale: float, operand_dtype: jnp.dtype) -> None:
        """Takes the gates [C, K], natural logarithms."""
        self._gates = gates * math.log2(math.e)
        self._scale = scale
        self._operand_dtype = operand_dtype
        self._chunk = gates.shape[0]

    def added_state(self, k: jax.Array, v: jax.Array) -> jax.Array:
        """What the chunk adds to the state, [V, K]."""
        return product(v, k * self._from_token, (0, 0), self._operand_dtype)

    def added_cotangent(self, q: jax.Array, dout: jax.Array) -> jax.Array:
        """What the outputs add to the cotangent of the state that enters, [V, K]."""
        return product(dout, self._scaled(q) * self._to_token, (0, 0), self._operand_dtype)

    def decay_state(self, state: jax.Array) -> jax.Array:
        """The state [V, K] after the chunk's decay."""
        return jnp.exp2(self._sum) * state

    def _scaled(self, q: jax.Array) -> jax.Array:
        return self._scale * q.astype(jnp.float32)

    @cached_property
    def _to_token(self) -> jax.Array:
        """The decay from the start of the chunk to each token, [C, K]."""
        return jnp.exp2(sums_to(self._gates))

    @cached_property
    def _from_token(self) -> jax.Array:
        """The decay from after each token to the end of the chunk, [C, K]."""
        return jnp.exp2(sums_after(self._gates))

    @cached_property
    def _sum(self) -> jax.Array:
        """[1, K]."""
        return jnp.sum(self._gates, axis=0, keepdims=True)
