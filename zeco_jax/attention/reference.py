"""The recurrence, token by token: slow, plain, and what every other backend is held against."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from zeco_jax.attention.backend import Backend, Gradients, Summary, total_decay
from zeco_jax.attention.gates import accumulation_dtype
from zeco_jax.varying import zeros_varying


def recurrence(
    q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, state_in: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    r"""Runs :math:`S_t = e^{g_t} \odot S_{t-1} + k_t v_t^\top`, :math:`o_t = \text{scale} \cdot q_t S_t` as written.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        gates: [B or 1, T, H, K or 1], natural logarithms.
        state_in: [B, H, K, V].
        scale: factor on the outputs.

    Returns:
        The outputs [B, T, H, V] in v's dtype and the last state.
    """
    dtype = state_in.dtype

    def token(state: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_t, k_t, v_t, gate = (x.astype(dtype) for x in inputs)
        state = jnp.exp(gate)[..., None] * state + k_t[..., :, None] * v_t[..., None, :]
        # Products and a sum instead of a matrix product: full precision on every platform.
        return state, scale * jnp.sum(q_t[..., :, None] * state, axis=-2)

    tokens_first = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, gates)]
    state_out, out = jax.lax.scan(token, state_in, tuple(tokens_first))
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), state_out


@dataclass(frozen=True)
class ReferenceBackend(Backend):
    """The token recurrence behind the seam; its adjoints are JAX's own, at the price of all T states in memory."""

    def summarize(self, k: jax.Array, v: jax.Array, gates: jax.Array) -> Summary:
        """See `Backend.summarize`."""
        batch, _, heads, key_width = k.shape
        shape = (batch, heads, key_width, v.shape[-1])
        empty = zeros_varying(shape, accumulation_dtype(k.dtype), like=k)
        return Summary(total_decay(gates, shape), recurrence(k, k, v, gates, empty, 1.0)[1])

    def replay(
        self, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, state_in: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `Backend.replay`."""
        return recurrence(q, k, v, gates, state_in, self.scale)

    def summarize_adjoint(self, q: jax.Array, gates: jax.Array, dout: jax.Array) -> jax.Array:
        """See `Backend.summarize_adjoint`."""
        batch, _, heads, key_width = q.shape
        shape = (batch, heads, key_width, dout.shape[-1])
        state_in = zeros_varying(shape, accumulation_dtype(q.dtype), like=q)
        nothing = jnp.zeros_like(dout)
        _, pullback = jax.vjp(lambda state: self.replay(q, jnp.zeros_like(q), nothing, gates, state)[0], state_in)
        return pullback(dout)[0]

    def replay_adjoint(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        dout: jax.Array,
        dstate_out: jax.Array,
    ) -> tuple[Gradients, jax.Array]:
        """See `Backend.replay_adjoint`."""
        _, pullback = jax.vjp(self.replay, q, k, v, gates, state_in)
        *gradients, dstate_in = pullback((dout, dstate_out))
        return Gradients(*gradients), dstate_in
