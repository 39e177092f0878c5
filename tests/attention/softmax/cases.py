"""Inputs of softmax attention, by what is special about them."""

from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Case:
    """One call: its shapes, whether the ids change, and a factor on the queries."""

    name: str
    tokens: int = 37
    heads: int = 4
    key_heads: int = 2
    key_width: int = 8
    value_width: int = 12
    batch: int = 2
    packed: bool = False
    query_factor: float = 1.0
    scale: float | None = None
    dtype: str = "float32"


class Arrays(NamedTuple):
    """q, k, v, the cotangent of the outputs, and the ids or None."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    segment_ids: np.ndarray | None


def arrays(case: Case) -> Arrays:
    """The same for the same case."""
    rng = np.random.default_rng(0)
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype
    b, t, h, g, k, v = case.batch, case.tokens, case.heads, case.key_heads, case.key_width, case.value_width
    q, k, v, dout = (
        (factor * rng.normal(size=shape)).astype(dtype)
        for shape, factor in (
            ((b, t, h, k), case.query_factor),
            ((b, t, g, k), 1),
            ((b, t, g, v), 1),
            ((b, t, h, v), 1),
        )
    )
    # Ids that come back are other documents.
    ids = (np.cumsum(rng.uniform(size=(b, t)) < 0.15, axis=1) % 3).astype(np.int32) if case.packed else None
    return Arrays(q, k, v, dout, ids)


PLAIN = Case("plain", key_heads=4, value_width=8)
GROUPED = Case("grouped_heads-packed", packed=True)
EVERY = (
    PLAIN,
    GROUPED,
    Case("one_key_head-even_blocks", tokens=32, key_heads=1, key_width=5, value_width=3, scale=0.3),
    Case("large_scores-packed", tokens=50, query_factor=30.0, packed=True),
    Case("two_tokens", tokens=2),
    Case("fewer_tokens_than_a_block-packed", tokens=7, packed=True),
)
