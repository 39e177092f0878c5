"""Zero-communication-overhead sequence parallelism (ZeCO) for linear attention."""

from zeco_jax.collectives import all_scan
from zeco_jax.parallel import (
    linear_attention,
    ring_attention,
    sharded_linear_attention,
    sharded_softmax_attention,
    softmax_attention,
    ulysses_attention,
)

__all__ = [
    "all_scan",
    "linear_attention",
    "ring_attention",
    "sharded_linear_attention",
    "sharded_softmax_attention",
    "softmax_attention",
    "ulysses_attention",
]
