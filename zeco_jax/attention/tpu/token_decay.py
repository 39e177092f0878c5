"""Decays of one gate per token: applied to the scores, through differences of sums that lose no digits."""

import math
from functools import cached_property

import jax
import jax.numpy as jnp

from zeco_jax.attention.tpu.products import product
from zeco_jax.attention.tpu.tiling import LANES

# Its power of 2 is 0 in float32, and so is that of everything below.
_SMALLEST = -150.0
# Sums of 256 multiples of this, none of them below _SMALLEST, are exact in float32.
_QUANTUM = 2.0**-8


def parts_of(dtype: jnp.dtype) -> int:
    """How many numbers of float32 make up a sum of gates that is accurate enough for operands of `dtype`."""
    return 2 if jnp.dtype(dtype) == jnp.float32 else 1


def gate_sums(gates: jax.Array, parts: int) -> jax.Array:
    r"""Cumulative sums of the gates of each chunk, as powers of 2, whose differences are accurate at any strength.

    After a gate of -60 a sum in float32 has lost the digits of the small gates before it, and their difference is what
    the decay between two tokens is made of. In two parts nothing is lost: the first sums the gates rounded to multiples
    of 1/256, which is exact, and the second what the rounding left, which stays small. One part is right to 1e-3, and
    to 2e-6 as long as the sum itself is above -16: enough beside operands of bfloat16.

    Args:
        gates: [..., C], natural logarithms, C at most 256.
        parts: 1 or 2.

    Returns:
        [parts, ..., C], inclusive.
    """
    gates = jnp.maximum(gates * math.log2(math.e), _SMALLEST)
    if parts == 1:
        return jnp.cumsum(gates, axis=-1)[None]
    coarse = jnp.round(gates / _QUANTUM) * _QUANTUM
    return jnp.cumsum(jnp.stack([coarse, gates - coarse]), axis=-1)


class TokenDecay:
    r"""What one chunk of one head computes, with :math:`b_i` the sum of gates up to token i.

    .. math:: O = \text{scale} \cdot \left((Q K^\top \odot D) V + e^{b} \odot Q S\right), \quad
        S' = e^{b_C} S + K^\top (e^{b_C - b} \odot V), \quad D_{ij} = e^{b_i - b_j} \text{ for } i \ge j

    States are transposed, [V, K].
    """

    def __init__(self, rows: list[jax.Array], columns: list[jax.Array], scale: float, operand_dtype: jnp.dtype) -> None:
        """Takes the parts of the sums as rows [1, C] and as columns [C, 1]."""
        self._rows, self._columns = rows, columns
        self._scale = scale
        self._operand_dtype = operand_dtype
        self._chunk = rows[0].shape[-1]
        self._last = [column[self._chunk - 1 :] for column in columns]

    def added_state(self, k: jax.Array, v: jax.Array) -> jax.Array:
        """What the chunk adds to the state, [V, K]."""
        from_token = jnp.exp2(sum(last - row for last, row in zip(self._last, self._rows, strict=True)))
        return product(v.T * from_token, k, (1, 0), self._operand_dtype)

    def added_cotangent(self, q: jax.Array, dout: jax.Array) -> jax.Array:
        """What the outputs add to the cotangent of the state that enters, [V, K]."""
        return product(dout.T * (self._scale * jnp.exp2(sum(self._rows))), q, (1, 0), self._operand_dtype)

    def decay_state(self, state: jax.Array) -> jax.Array:
        """The state [V, K] after the chunk's decay."""
        return jnp.exp2(sum(self._last)) * state

    def outputs(self, q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array) -> jax.Array:
        """The outputs [C, V], from the state that enters."""
        dtype = self._operand_dtype
        scores = product(q, k, (1, 1), dtype) * self._matrix(transposed=False)
        intra = product(scores, v, (1, 0), dtype)
        inter = product(q, state, (1, 1), dtype)
        return self._scale * (intra + self._to_token(v.shape[1]) * inter)

    def adjoint(
        self, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, state: jax.Array, dstate: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The gradients of what the chunk computes.

        A gate's gradient is the sum of the terms that the gate decays, each of them as small as its decay makes it: a
        difference of sums would leave the rounding errors of large terms where the truth is tiny.

        Args:
            q: [C, K].
            k: [C, K].
            v: [C, V].
            dout: [C, V].
            state: the state that enters, [V, K].
            dstate: the cotangent of the state that leaves, [V, K].

        Returns:
            Cotangents of q, k and v, and that of the gates [1, C].
        """
        dtype = self._operand_dtype
        to_token, from_token = self._scale * self._to_token(q.shape[1]), self._from_token(q.shape[1])
        dq_inter = to_token * product(dout, state, (1, 0), dtype)
        dk_inter = from_token * product(v, dstate, (1, 0), dtype)
        dscores = product(dout, v, (1, 1), dtype) * (self._scale * self._matrix(transposed=False))
        # What is wanted transposed is computed transposed: a product more, but nothing moves across lanes.
        decays = self._scale * self._matrix(transposed=True)
        raw = product(k, q, (1, 1), dtype)
        dscores_transposed = product(v, dout, (1, 1), dtype) * decays
        dq = product(dscores, k, (1, 0), dtype) + dq_inter
        dk = product(dscores_transposed, q, (1, 0), dtype) + dk_inter
        dv = product(raw * decays, dout, (1, 0), dtype)
        dv += self._from_token(v.shape[1]) * product(k, dstate, (1, 1), dtype)

        # Entry [j, t] of from_scores: what the scores between token j and the tokens from t on put on gate t.
        from_t_on = jnp.where(self._at_or_after, 1.0, 0.0)
        from_scores = product(dscores_transposed * raw, from_t_on, (1, 0), dtype)
        from_queries, from_keys = (
            jnp.sum(x.astype(jnp.float32) * dx, axis=1, keepdims=True) for x, dx in ((q, dq_inter), (k, dk_inter))
        )
        decayed = jnp.where(self._at_or_after, from_queries, from_scores + from_keys)
        through = self.decay_state(state.astype(jnp.float32)) * dstate
        through = jnp.sum(jnp.sum(through, axis=0, keepdims=True), axis=1, keepdims=True)
        return dq, dk, dv, jnp.sum(decayed, axis=0, keepdims=True) + through

    @cached_property
    def _at_or_after(self) -> jax.Array:
        """[C, C]: whether the row's token is the column's or a later one."""
        shape = (self._chunk, self._chunk)
        return jax.lax.broadcasted_iota(jnp.int32, shape, 0) >= jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def _matrix(self, *, transposed: bool) -> jax.Array:
        """D, [C, C]."""
        columns = [_repeat(lanes, self._chunk) for lanes in self._lanes]
        if transposed:
            exponents = sum(row - column for row, column in zip(self._rows, columns, strict=True))
            row, column = (jax.lax.broadcasted_iota(jnp.int32, exponents.shape, axis) for axis in (0, 1))
            return jnp.exp2(jnp.where(row <= column, exponents, -jnp.inf))
        exponents = sum(column - row for row, column in zip(self._rows, columns, strict=True))
        return jnp.exp2(jnp.where(self._at_or_after, exponents, -jnp.inf))

    @cached_property
    def _lanes(self) -> list[jax.Array]:
        """The columns in all lanes, [C, 128]: done once, as moving numbers across lanes is slow."""
        return [jnp.broadcast_to(column, (self._chunk, LANES)) for column in self._columns]

    def _to_token(self, width: int) -> jax.Array:
        """The decay from the start of the chunk to each token, [C, width]."""
        return _repeat(jnp.exp2(sum(self._lanes)), width)

    def _from_token(self, width: int) -> jax.Array:
        """The decay from after each token to the end of the chunk, [C, width]."""
        exponents = sum(last - lanes for last, lanes in zip(self._last, self._lanes, strict=True))
        return _repeat(jnp.exp2(exponents), width)


def _repeat(lanes: jax.Array, width: int) -> jax.Array:
    """[C, 128] -> [C, width], of lanes that are all alike."""
    if width <= LANES:
        return lanes[:, :width]
    return jnp.concatenate([lanes] * (width // LANES), axis=1)
