"""The seam between kernels and meshes: softmax attention of one block of queries to one block of keys."""

from typing import Protocol

import jax


class SoftmaxBackend(Protocol):
    r"""Softmax attention of a block of queries to a block of keys, and this block's share of the gradients.

    .. math:: s_{ij} = \text{scale} \cdot q_i k_j^\top, \qquad
        \ell_i = \log \sum_j e^{s_{ij}}, \qquad o_i = \sum_j e^{s_{ij} - \ell_i} v_j

    over the keys j that query i sees. Blocks of keys are put together by `merge`; backwards every block gets the merged
    `out` and `log_sum_exp`, and the blocks' gradients are summed (FlashAttention-2, arXiv 2307.08691).

    Arrays: q [B, T, H, K]; k [B, S, G, K] and v [B, S, G, V], where G divides H: query head h uses key head
    h // (H / G); all of one dtype. Backends are static: hashable, and equal when they do the same.
    """

    def check(self, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
        """Raises NotImplementedError with the reason if this backend can't serve these arrays."""

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
        """The outputs of a block and the logarithm of the sum of the exponentials of its scores.

        Args:
            q: [B, T, H, K].
            k: [B, S, G, K].
            v: [B, S, G, V].
            scale: factor on the scores.
            causal: query i sees the keys j <= i, and T = S; else it sees all.
            query_documents: [B, T] int32: a query sees only the keys of its own document. None: one document.
            key_documents: [B, S] int32; None if and only if `query_documents` is.

        Returns:
            out: [B, T, H, V] in float32 or q's dtype (float64 for float64 inputs), 0 where a query sees nothing.
            log_sum_exp: [B, T, H] float32 (float64 for float64 inputs), -inf where a query sees nothing.
        """

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
        """This block's share of the gradients.

        Args:
            q: [B, T, H, K].
            k: [B, S, G, K].
            v: [B, S, G, V].
            out: [B, T, H, V], merged over all blocks of keys.
            log_sum_exp: [B, T, H], merged over all blocks of keys.
            dout: [B, T, H, V], the cotangent of the merged outputs.
            scale: as for `attend`.
            causal: as for `attend`.
            query_documents: as for `attend`.
            key_documents: as for `attend`.

        Returns:
            The cotangents of q, k and v, float32 (float64 for float64 inputs).
        """
