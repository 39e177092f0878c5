"""What softmax attention is measured against: all scores at once in float64, and JAX's own gradient."""

import jax
import jax.numpy as jnp
import numpy as np


def softmax_oracle(q, k, v, scale=None, segment_ids=None):
    """Causal softmax attention [B, T, H, V] of q [B, T, H, K], k [B, T, G, K] and v [B, T, G, V], in float64."""
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x, jnp.float64) for x in (q, k, v))
        tokens, repeats = q.shape[1], q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
        scores = jnp.einsum("bthk,bshk->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        seen = np.tril(np.ones((1, 1, tokens, tokens), bool))
        if segment_ids is not None:
            ids = np.asarray(segment_ids)
            document = np.cumsum(np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))), axis=1)
            seen = seen & (document[:, :, None] == document[:, None, :])[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshv->bthv", weights, v)


def softmax_oracle_gradients(q, k, v, dout, scale=None, segment_ids=None):
    """The outputs, and the cotangents of q, k and v for `dout`."""
    with jax.enable_x64(True):
        q, k, v, dout = (jnp.asarray(x, jnp.float64) for x in (q, k, v, dout))
        out, pullback = jax.vjp(lambda q, k, v: softmax_oracle(q, k, v, scale, segment_ids), q, k, v)
        return out, pullback(dout)
