"""Softmax attention of a stretch of tokens to itself and to the tokens before it."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from zeco_jax.attention.softmax.backend import SoftmaxBackend
from zeco_jax.attention.softmax.merging import merge
from zeco_jax.attention.softmax.operator import _attend
from zeco_jax.attention.softmax.registry import make_softmax_backend
from zeco_jax.varying import match_varying


def attend_after_prefix(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    prefix_k: jax.Array,
    prefix_v: jax.Array,
    *,
    documents: jax.Array,
    prefix_documents: jax.Array,
    scale: float | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Causal softmax attention of T tokens to themselves and, of the same document, to S tokens before them.

    Differentiable in every float argument. Scores of all tokens never exist at once.

    Args:
        q: [B, T, H, K] floating point.
        k: [B, T, G, K]; G divides H, query head h uses key head h // (H / G).
        v: [B, T, G, V].
        prefix_k: [B, S, G, K], in any order.
        prefix_v: [B, S, G, V].
        documents: [B, T] int32: a token sees only keys of its own document.
        prefix_documents: [B, S] int32; a document that no token has for a place that is empty.
        scale: factor on the scores, `K ** -0.5` if None.
        backend: a name in `SOFTMAX_BACKENDS`, or None for the best one that can serve.

    Returns:
        [B, T, H, V] in q's dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from zeco_jax.attention.softmax.prefix import attend_after_prefix
        >>> zero, empty = jnp.zeros((1, 1, 1, 1)), -1
        >>> prefix_v = jnp.array([4.0, 9.0]).reshape(1, 2, 1, 1)
        >>> attend_after_prefix(zero, zero, zero, 0 * prefix_v, prefix_v, documents=jnp.array([[0]]),
        ...                     prefix_documents=jnp.array([[0, empty]])).item()
        2.0
    """
    q, k, v, prefix_k, prefix_v = match_varying([x.astype(q.dtype) for x in (q, k, v, prefix_k, prefix_v)])
    keys, values, every_document = (
        jnp.concatenate(match_varying(parts), axis=1)
        for parts in ((prefix_k, k), (prefix_v, v), (prefix_documents, documents))
    )
    local = make_softmax_backend(backend, q, k, v)
    return _attend(q, keys, values, every_document, q.shape[-1] ** -0.5 if scale is None else scale, AfterPrefix(local))


@dataclass(frozen=True)
class AfterPrefix(SoftmaxBackend):
    """Attention to S + T keys, of which the last T are the queries' own, as if it were one block.

    Documents are those of the keys.

    Attributes:
        local: computes the two blocks.
    """

    local: SoftmaxBackend

    def check(self, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
        """See `SoftmaxBackend.check`."""
        self.local.check(q, k, v)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        scale: float,
        causal: bool,
        query_documents: jax.Array | None = None,
        key_documents: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """See `SoftmaxBackend.attend`; `causal` concerns the queries' own keys."""
        parts = _parts(q.shape[1], k, v, key_documents, causal)
        return merge(*(self.local.attend(q, *keys, scale=scale, **options) for keys, options in parts))

    def adjoint(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        out: jax.Array,
        log_sum_exp: jax.Array,
        dout: jax.Array,
        *,
        scale: float,
        causal: bool,
        query_documents: jax.Array | None = None,
        key_documents: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `SoftmaxBackend.adjoint`."""
        parts = _parts(q.shape[1], k, v, key_documents, causal)
        gradients = (
            self.local.adjoint(q, *keys, out, log_sum_exp, dout, scale=scale, **options) for keys, options in parts
        )
        (dq, *of_prefix), (own_dq, *own) = gradients
        return dq + own_dq, *(jnp.concatenate(pair, axis=1) for pair in zip(of_prefix, own, strict=True))


def _parts(own: int, k: jax.Array, v: jax.Array, documents: jax.Array, causal: bool) -> Iterator[tuple[tuple, dict]]:
    """Keys, values and options of the prefix, then those of the `own` last tokens."""
    for part, hidden_future in ((slice(None, -own), False), (slice(-own, None), causal)):
        options = {"causal": hidden_future, "query_documents": documents[:, -own:], "key_documents": documents[:, part]}
        yield (k[:, part], v[:, part]), options
