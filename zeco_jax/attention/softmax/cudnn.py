"""Softmax attention by cuDNN's kernels for NVIDIA GPUs, through the primitives that JAX ships."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

# `jax.nn.dot_product_attention` rounds the log-sum-exp to q's dtype, and its gradient can't take a merged one.
from jax._src.cudnn import fused_attention_stablehlo as fused

from zeco_jax.attention.softmax.backend import SoftmaxBackend
from zeco_jax.platforms import platform_in_scope
from zeco_jax.varying import match_varying

_SERVED_DTYPES = (jnp.bfloat16, jnp.float16)
# A log-sum-exp that leaves weights of 0; finite, as the kernel computes with it.
_NOTHING_SEEN = 1e30


@dataclass(frozen=True)
class CudnnSoftmaxBackend(SoftmaxBackend):
    """cuDNN's flash attention: bfloat16 and float16, products and outputs in the inputs' dtype, sums in float32.

    Widths are filled up with zeros to the wider one's next multiple of 8. Documents become a mask in memory, two bytes
    for each pair of a query and a key of one call; queries then come in several calls, so that it stays small.

    Attributes:
        masked_queries: queries per call where there are documents, an even number.
    """

    masked_queries: int = 4096

    def check(self, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
        """See `SoftmaxBackend.check`."""
        if platform_in_scope() != "gpu":
            raise NotImplementedError(f"needs an NVIDIA GPU, this program is for platform {platform_in_scope()!r}")
        dtype = jnp.result_type(q, k, v)
        if dtype not in _SERVED_DTYPES:
            raise NotImplementedError(f"computes in bfloat16 or float16, got {dtype}")
        try:
            fused.check_cudnn_version()
        except RuntimeError as error:
            raise NotImplementedError(str(error)) from None
        if not fused.check_compute_capability("8.0"):
            raise NotImplementedError("needs an NVIDIA GPU of compute capability 8.0 (A100) or later")
        widest, width = 256 if fused.check_compute_capability("9.0") else 128, max(q.shape[-1], v.shape[-1])
        if width > widest:
            raise NotImplementedError(f"takes widths K and V up to {widest} on this GPU, got {width}")

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
        """See `SoftmaxBackend.attend`; out is in q's dtype."""
        q, k, v = match_varying([q, k, v])
        shape = *q.shape[:3], v.shape[-1]
        operands = _Operands.fill(q, k, v, query_documents, key_documents)
        outs, logs = [], []
        for call in self._calls(operands, causal):
            out, log_sum_exp = fused.dot_product_attention(
                *call.operands, call.bias(), scale=scale, mask_type=call.mask_type, return_residual=True
            )
            log_sum_exp = log_sum_exp.transpose(0, 2, 1)
            if call.seen is not None:
                sees = jnp.any(call.seen, axis=-1)[..., None]
                out, log_sum_exp = jnp.where(sees[..., None], out, 0), jnp.where(sees, log_sum_exp, -jnp.inf)
            outs.append(out)
            logs.append(log_sum_exp)
        return _cut(jnp.concatenate(outs, axis=1), shape), _cut(jnp.concatenate(logs, axis=1), shape[:3])

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
        q, k, v, out, log_sum_exp, dout = match_varying([q, k, v, out, log_sum_exp, dout])
        operands = _Operands.fill(q, k, v, query_documents, key_documents)
        out, dout = (_fill(x.astype(q.dtype), operands.q.shape) for x in (out, dout))
        log_sum_exp = jnp.where(log_sum_exp == -jnp.inf, _NOTHING_SEEN, log_sum_exp)
        log_sum_exp = _fill(log_sum_exp, operands.q.shape[:3])
        dqs, dks, dvs = [], [], []
        for call in self._calls(operands, causal):
            logs, outs, douts = (x[:, call.queries] for x in (log_sum_exp, out, dout))
            dq, dk, dv = _call_adjoint(call, scale, logs.transpose(0, 2, 1), outs, douts)
            dqs.append(dq.astype(jnp.float32))
            dks.append(_fill(dk.astype(jnp.float32), operands.k.shape))
            dvs.append(_fill(dv.astype(jnp.float32), operands.v.shape))
        return _cut(jnp.concatenate(dqs, axis=1), q.shape), _cut(sum(dks), k.shape), _cut(sum(dvs), v.shape)

    def _calls(self, operands: "_Operands", causal: bool) -> Iterator["_Call"]:
        """The kernel's calls: one, but for documents, whose mask would be as large as all scores."""
        q, k, v, documents = operands
        if documents is None:
            yield _Call(slice(None), (q, k, v), causal, None)
            return
        query_documents, key_documents = documents
        for first in range(0, q.shape[1], self.masked_queries):
            queries = slice(first, min(first + self.masked_queries, q.shape[1]))
            keys = slice(queries.stop if causal else None)
            seen = query_documents[:, queries, None] == key_documents[:, None, keys]
            # The kernel's own causal mask starts with the first query at the first key.
            if causal and first:
                places = jnp.arange(queries.stop)
                seen &= places <= places[queries, None]
            yield _Call(queries, (q[:, queries], k[:, keys], v[:, keys]), causal and not first, seen)


class _Operands(NamedTuple):
    """Queries, keys and values of one width, and the documents of queries and keys, or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    documents: tuple[jax.Array, jax.Array] | None

    @classmethod
    def fill(
        cls,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        query_documents: jax.Array | None,
        key_documents: jax.Array | None,
    ) -> "_Operands":
        """Fills up what the kernel doesn't take as it is: widths, and under a mask odd numbers of tokens."""
        width = max(q.shape[-1], v.shape[-1])
        width += -width % 8
        if query_documents is None or key_documents is None:
            tokens, keys, documents = q.shape[1], k.shape[1], None
        else:
            tokens, keys = q.shape[1] + q.shape[1] % 2, k.shape[1] + k.shape[1] % 2
            nobodys = jnp.iinfo(key_documents.dtype).min
            documents = (
                _fill(query_documents, (q.shape[0], tokens)),
                _fill(key_documents, (k.shape[0], keys), nobodys),
            )
        q = _fill(q, (q.shape[0], tokens, q.shape[2], width))
        k, v = (_fill(x, (x.shape[0], keys, x.shape[2], width)) for x in (k, v))
        return cls(q, k, v, documents)


class _Call(NamedTuple):
    """One call of the kernel.

    Attributes:
        queries: which they are.
        operands: its queries, keys and values.
        causal: whether the kernel hides the keys j > i.
        seen: [B, T, S], which keys each query sees; None if the kernel needs no mask.
    """

    queries: slice
    operands: tuple[jax.Array, jax.Array, jax.Array]
    causal: bool
    seen: jax.Array | None

    @property
    def mask_type(self) -> fused.MaskType:
        """The kernel's own mask."""
        return fused.MaskType.CAUSAL if self.causal else fused.MaskType.NO_MASK

    def bias(self) -> jax.Array | None:
        """What is added to the scores, [B, 1, T, S]."""
        if self.seen is None:
            return None
        hidden = fused.get_large_negative_number(self.operands[0].dtype)
        return jnp.where(self.seen, jnp.zeros_like(hidden), hidden)[:, None]


def _call_adjoint(
    call: _Call, scale: float, log_sum_exp: jax.Array, out: jax.Array, dout: jax.Array
) -> Sequence[jax.Array]:
    bias, unused = call.bias(), jnp.zeros(0, dout.dtype)
    options = {"score_mod": None} if "score_mod" in inspect.signature(fused.dot_product_attention).parameters else {}
    # The wrapper's six operands after the bias are for lengths, packing and paging.
    return fused._dot_product_attention_bwd_p_wrapper.bind(
        *call.operands,
        unused if bias is None else bias,
        *[unused] * 6,
        log_sum_exp,
        out,
        dout,
        scale=scale,
        seed=42,
        dropout_rate=0.0,
        # There is a bias; its gradient isn't wanted.
        variadic_args=(bias is not None, False),
        mask_type=call.mask_type,
        layout=fused.AttentionLayout.BTNH.value,
        sliding_window_length=None,
        **options,
    )


def _fill(x: jax.Array, shape: Sequence[int], value: int = 0) -> jax.Array:
    """Fills x up to `shape` at the ends."""
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)], constant_values=value)


def _cut(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The way back from `_fill`."""
    return x[tuple(slice(size) for size in shape)]
