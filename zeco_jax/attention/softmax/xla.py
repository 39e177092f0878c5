"""Softmax attention in plain XLA, block by block: runs everywhere, memory linear in the number of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from zeco_jax.attention.gates import accumulation_dtype
from zeco_jax.attention.softmax.backend import SoftmaxBackend
from zeco_jax.attention.xla.contract import contract
from zeco_jax.platforms import platform_in_scope
from zeco_jax.varying import match_varying

Arrays = tuple[jax.Array, ...]


@dataclass(frozen=True)
class XlaSoftmaxBackend(SoftmaxBackend):
    """FlashAttention-2's loops over blocks of queries and keys; blocks that the masks hide are left out.

    Products are in the inputs' dtype, sums and outputs in float32 (float64 for float64 inputs).

    Attributes:
        block_size: queries, and keys, per block: more make fewer and larger products, and more scores at once; None for
            256 on CPUs, where blocks then fit the caches, and 1024 elsewhere.
    """

    block_size: int | None = None

    def check(self, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
        """Serves everything."""

    def _block_size(self) -> int:
        return self.block_size or (256 if platform_in_scope() == "cpu" else 1024)

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
        """See `SoftmaxBackend.attend`."""
        blocks = _Blocks.cut(self._block_size(), q, k, v, scale, causal, query_documents, key_documents)

        def block_of_queries(i: jax.Array) -> Arrays:
            def add_keys(j: jax.Array, carry: Arrays) -> Arrays:
                largest, total, out = carry
                scores = blocks.scores(i, j)
                new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
                # Any finite number does where nothing has been seen yet.
                shift = jnp.where(new_largest == -jnp.inf, 0, new_largest)
                weights, decay = jnp.exp(scores - shift[..., None]), jnp.exp(largest - shift)
                out = decay[..., None] * out + contract("bgrts,bgsv->bgrtv", weights, blocks.v[j], v.dtype)
                return new_largest, decay * total + jnp.sum(weights, axis=-1), out

            def add_seen_keys(j: jax.Array, carry: Arrays) -> Arrays:
                return blocks.where_seen(i, j, partial(add_keys, j), carry)

            # Only the types are used: zeros laid out, over meshes, as what will be added.
            like = blocks.scores(i, 0)
            zeros = jnp.zeros_like(like[..., 0])
            zeros_out = jnp.zeros_like(contract("bgrts,bgsv->bgrtv", like, blocks.v[0], v.dtype))
            last = i + 1 if causal else blocks.k.shape[0]
            largest, total, out = jax.lax.fori_loop(0, last, add_seen_keys, (zeros - jnp.inf, zeros, zeros_out))
            return out / jnp.where(total == 0, 1, total)[..., None], largest + jnp.log(total)

        out, log_sum_exp = jax.lax.map(block_of_queries, jnp.arange(blocks.q.shape[0]))
        tokens = q.shape[1]
        return _join(out, tokens), _join(log_sum_exp[..., None], tokens)[..., 0]

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
    ) -> Arrays:
        """See `SoftmaxBackend.adjoint`."""
        q, k, v, out, log_sum_exp, dout = match_varying([q, k, v, out, log_sum_exp, dout])
        blocks = _Blocks.cut(self._block_size(), q, k, v, scale, causal, query_documents, key_documents)
        dtype = accumulation_dtype(q.dtype)
        delta = jnp.sum(dout.astype(dtype) * out.astype(dtype), axis=-1)
        # Weights of 0 where a query sees nothing.
        log_sum_exp = jnp.where(log_sum_exp == -jnp.inf, jnp.inf, log_sum_exp)
        dout, delta, log_sum_exp = (
            _cut(x, self._block_size(), k.shape[2]) for x in (dout, delta[..., None], log_sum_exp[..., None])
        )

        def block_of_keys(dq: jax.Array, j: jax.Array) -> tuple[jax.Array, Arrays]:
            def add_queries(i: jax.Array, carry: Arrays) -> Arrays:
                dq, dk, dv = carry
                weights = jnp.exp(blocks.scores(i, j) - log_sum_exp[i])
                dweights = contract("bgrtv,bgsv->bgrts", dout[i].astype(dtype), blocks.v[j], v.dtype)
                dscores = scale * weights * (dweights - delta[i])
                dq = dq.at[i].add(contract("bgrts,bgsk->bgrtk", dscores, blocks.k[j], k.dtype))
                dk += contract("bgrts,bgrtk->bgsk", dscores, blocks.q[i], q.dtype)
                return dq, dk, dv + contract("bgrts,bgrtv->bgsv", weights, dout[i], v.dtype)

            def add_seeing_queries(i: jax.Array, carry: Arrays) -> Arrays:
                return blocks.where_seen(i, j, partial(add_queries, i), carry)

            zeros = (jnp.zeros_like(x[j], dtype) for x in (blocks.k, blocks.v))
            first = j if causal else 0
            dq, *dkv = jax.lax.fori_loop(first, blocks.q.shape[0], add_seeing_queries, (dq, *zeros))
            return dq, tuple(dkv)

        dq, (dk, dv) = jax.lax.scan(block_of_keys, jnp.zeros_like(blocks.q, dtype), jnp.arange(blocks.k.shape[0]))
        tokens, keys = q.shape[1], k.shape[1]
        return _join(dq, tokens), _join(dk[:, :, :, None], keys), _join(dv[:, :, :, None], keys)


@dataclass(frozen=True)
class _Blocks:
    """Queries and keys in blocks of C, the last ones filled up.

    Attributes:
        q: [blocks of queries, B, G, H / G, C, K].
        k: [blocks of keys, B, G, C, K].
        v: [blocks of keys, B, G, C, V].
        documents: those of the queries [blocks, B, C] and of the keys [blocks, B, C], or None.
        keys: how many there are.
        scale: factor on the scores.
        causal: whether query i sees the keys j <= i alone.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    documents: tuple[jax.Array, jax.Array] | None
    keys: int
    scale: float
    causal: bool

    @classmethod
    def cut(
        cls,
        block_size: int,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        scale: float,
        causal: bool,
        query_documents: jax.Array | None,
        key_documents: jax.Array | None,
    ) -> "_Blocks":
        """Cuts the arguments of `SoftmaxBackend.attend`."""
        q, k, v = match_varying([q, k, v])
        groups = k.shape[2]
        documents = None
        if query_documents is not None and key_documents is not None:
            documents = tuple(
                _cut(x[:, :, None, None], block_size, 1)[:, :, 0, 0, :, 0] for x in (query_documents, key_documents)
            )
        cut_k, cut_v = (_cut(x, block_size, groups)[:, :, :, 0] for x in (k, v))
        return cls(_cut(q, block_size, groups), cut_k, cut_v, documents, k.shape[1], scale, causal)

    def where_seen(self, i: jax.Array, j: jax.Array, add: Callable[[Arrays], Arrays], carry: Arrays) -> Arrays:
        """What `add` makes of the carry; the carry itself where blocks i of queries and j of keys share no document."""
        if self.documents is None:
            return add(carry)
        queries, keys = self.documents
        seen = jnp.any(queries[i][:, :, None] == keys[j][:, None, :])
        return jax.lax.cond(seen, add, lambda unchanged: unchanged, carry)

    def scores(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """Those of block i of the queries with block j of the keys, [B, G, H / G, C, C], -inf where unseen."""
        q, k = self.q[i], self.k[j]
        scores = self.scale * contract("bgrtk,bgsk->bgrts", q.astype(accumulation_dtype(q.dtype)), k, k.dtype)
        query_places = (i * q.shape[-2] + jnp.arange(q.shape[-2]))[:, None]
        key_places = j * k.shape[-2] + jnp.arange(k.shape[-2])
        seen = key_places < self.keys
        if self.causal:
            seen &= key_places <= query_places
        if self.documents is not None:
            queries, keys = self.documents
            seen &= (queries[i][:, :, None] == keys[j][:, None, :])[:, None, None]
        return jnp.where(seen, scores, -jnp.inf)


def _cut(x: jax.Array, block_size: int, groups: int) -> jax.Array:
    """[B, T, H, W] -> [blocks, B, groups, H / groups, C, W], filled up with zeros."""
    batch, tokens, _, width = x.shape
    block = min(block_size, tokens)
    x = jnp.pad(x, ((0, 0), (0, -tokens % block), (0, 0), (0, 0)))
    return x.reshape(batch, -1, block, groups, x.shape[2] // groups, width).transpose(1, 0, 3, 4, 2, 5)


def _join(x: jax.Array, tokens: int) -> jax.Array:
    """The way back from `_cut`."""
    blocks, batch, groups, heads, block, width = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, blocks * block, groups * heads, width)[:, :tokens]
