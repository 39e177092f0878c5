"""What a replay returns, whatever the decays."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from zeco_jax.attention.hopper.walk import Walk

States = Callable[..., jax.Array]
"""Gives the states that enter the chunks, [B, H, chunks, K, V] bfloat16, and not before its arguments are there."""


class Replayed(NamedTuple):
    """What a replay returns.

    Attributes:
        out: [B, T, H, V] bfloat16.
        left: [B, H, K, V] float32, the state that a closed walk ends with, else None.
        states: [B, H, chunks, K, V] bfloat16, those that enter the chunks where they were to be kept, else None.
    """

    out: jax.Array
    left: jax.Array | None = None
    states: jax.Array | None = None

    @classmethod
    def of(cls, outputs: Sequence[jax.Array], walk: Walk) -> "Replayed":
        """From what a kernel returns that may keep the chunks' states."""
        out, *others = outputs
        return cls(out, only(others[: walk.closed]), only(others[walk.closed :]))


def only(outputs: Sequence[jax.Array]) -> jax.Array | None:
    """An output that a kernel doesn't always have."""
    return outputs[0] if outputs else None
