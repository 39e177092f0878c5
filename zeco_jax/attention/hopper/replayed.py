"""What a replay returns, whatever the decays."""

from collections.abc import Sequence
from typing import NamedTuple

import jax


class Replayed(NamedTuple):
    """What a replay returns.

    Attributes:
        out: [B, T, H, V] bfloat16.
        left: [B, H, K, V] float32, the state that leaves the sequence where one stretch is all of it, else None.
        states: [B, H, chunks, K, V] bfloat16, those that enter the chunks where they were to be kept, else None.
    """

    out: jax.Array
    left: jax.Array | None = None
    states: jax.Array | None = None


def only(outputs: Sequence[jax.Array]) -> jax.Array | None:
    """An output that a kernel doesn't always have."""
    return outputs[0] if outputs else None
