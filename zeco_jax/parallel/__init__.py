"""One attention call over a mesh: joins the local operator with the exchange between ranks."""

from zeco_jax.parallel.exchange import AllScanExchange
from zeco_jax.parallel.linear_attention import linear_attention
from zeco_jax.parallel.sharded import sharded_linear_attention
from zeco_jax.parallel.sharding import MeshAxes, SequenceSharding, axis_tuple
from zeco_jax.parallel.ulysses import ulysses_attention

__all__ = [
    "AllScanExchange",
    "MeshAxes",
    "SequenceSharding",
    "axis_tuple",
    "linear_attention",
    "sharded_linear_attention",
    "ulysses_attention",
]
