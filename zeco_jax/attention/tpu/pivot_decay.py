"""Decays of one gate per token and key channel, of a chunk whose decays are mild: taken from the chunk's middle."""

import functools
from functools import cached_property

import jax
import jax.numpy as jnp

from zeco_jax.attention.tpu.channel_decay import ChannelDecay
from zeco_jax.attention.tpu.products import product
from zeco_jax.attention.tpu.running_sums import sums_from, sums_to

# A chunk is mild where its decays are above 2^-64: then sums of gates are right to 4e-6, no factor leaves 2^-32 to
# 2^32, and no score that isn't wanted overflows.
_STRONGEST_SUM = -64.0
# Shorter chunks may consist of one strong gate alone, beside which the rounding of differences counts.
_FEWEST_TOKENS = 16


class PivotDecay(ChannelDecay):
    r"""What a mild chunk of one head computes, with :math:`r` half the sum of its gates.

    .. math:: \hat Q = \text{scale} \cdot e^{b - r} \odot Q, \quad \hat K = e^{r - b} \odot K, \quad
        O = \text{tril}(\hat Q \hat K^\top) V + \hat Q (e^{r} \odot S), \quad
        S' = e^{b_C} \odot S + e^{b_C - r} \odot \hat K^\top V

    One product makes all scores, where `TreeDecay` makes one for each level of its tree. The factors, one above 1 and
    one below, would leave float32's range where decays are strong.
    """

    @staticmethod
    def suits(operand_dtype: jnp.dtype, tokens: int) -> bool:
        """Whether it may be used at all: it is accurate enough beside operands of bfloat16."""
        return jnp.dtype(operand_dtype) == jnp.bfloat16 and tokens >= _FEWEST_TOKENS

    @staticmethod
    def are_mild(decays: list["PivotDecay"]) -> jax.Array:
        """Whether it may be used for these chunks; those with a gate of NaN are not mild."""
        return jnp.min(functools.reduce(jnp.minimum, [decay._sum for decay in decays])) > _STRONGEST_SUM

    def added_state(self, k: jax.Array, v: jax.Array) -> jax.Array:
        """See `ChannelDecay.added_state`."""
        return self._to_end * product(v, self._k(k), (0, 0), self._operand_dtype)

    def added_cotangent(self, q: jax.Array, dout: jax.Array) -> jax.Array:
        """See `ChannelDecay.added_cotangent`."""
        return self._from_start * product(dout, self._q(q), (0, 0), self._operand_dtype)

    def outputs(self, q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array) -> jax.Array:
        """The outputs [C, V], from the state that enters."""
        dtype = self._operand_dtype
        scores = jnp.where(self._at_or_after(), product(self._q(q), self._k(k), (1, 1), dtype), 0.0)
        return product(scores, v, (1, 0), dtype) + product(self._q(q), self._from_start * state, (1, 1), dtype)

    def adjoint(
        self, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, state: jax.Array, dstate: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The gradients of what the chunk computes; see `TokenDecay.adjoint`. That of the gates is [C, K].

        With the same rounded operands in the gradients of Q and K, what a score puts on the gates before both of its
        tokens cancels up to the rounding of float32.
        """
        dtype = self._operand_dtype
        q_hat, k_hat = self._q(q), self._k(k)
        dscores = jnp.where(self._at_or_after(), product(dout, v, (1, 1), dtype), 0.0)
        dscores_transposed = jnp.where(self._at_or_before(), product(v, dout, (1, 1), dtype), 0.0)
        scores_transposed = jnp.where(self._at_or_before(), product(k_hat, q_hat, (1, 1), dtype), 0.0)
        dleaving = self._to_end * dstate
        dq = product(dscores, k_hat, (1, 0), dtype)
        dq += product(dout, self._from_start * state.astype(jnp.float32), (1, 0), dtype)
        dk_inter = product(v, dleaving, (1, 0), dtype)
        dk = product(dscores_transposed, q_hat, (1, 0), dtype) + dk_inter
        dv = product(scores_transposed, dout, (1, 0), dtype) + product(k_hat, dleaving, (1, 1), dtype)

        q_hat, k_hat = q_hat.astype(jnp.float32), k_hat.astype(jnp.float32)
        through = jnp.sum(self.decay_state(state.astype(jnp.float32)) * dstate, axis=0, keepdims=True)
        through += jnp.sum(k_hat * dk_inter, axis=0, keepdims=True)
        return self._q_factor * dq, self._k_factor * dk, dv, sums_from(q_hat * dq - k_hat * dk) + through

    @cached_property
    def _pivot(self) -> jax.Array:
        return 0.5 * self._sum

    @cached_property
    def _sums(self) -> jax.Array:
        return sums_to(self._gates) - self._pivot

    @cached_property
    def _q_factor(self) -> jax.Array:
        return self._scale * jnp.exp2(self._sums)

    @cached_property
    def _k_factor(self) -> jax.Array:
        return jnp.exp2(-self._sums)

    @cached_property
    def _from_start(self) -> jax.Array:
        """[1, K]."""
        return jnp.exp2(self._pivot)

    @cached_property
    def _to_end(self) -> jax.Array:
        """[1, K]."""
        return jnp.exp2(self._sum - self._pivot)

    def _q(self, q: jax.Array) -> jax.Array:
        return (q * self._q_factor).astype(self._operand_dtype)

    def _k(self, k: jax.Array) -> jax.Array:
        return (k * self._k_factor).astype(self._operand_dtype)

    def _at_or_after(self) -> jax.Array:
        """[C, C]: whether the row's token is the column's or a later one."""
        row, column = self._row_and_column()
        return row >= column

    def _at_or_before(self) -> jax.Array:
        row, column = self._row_and_column()
        return row <= column

    def _row_and_column(self) -> tuple[jax.Array, jax.Array]:
        shape = (self._chunk, self._chunk)
        return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
