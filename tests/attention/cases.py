"""The cases that every implementation of linear attention must pass, and the arrays of each.

Compiling costs more than running, so one case covers many values: each head has a decay of its own kind (`REGIMES`)
and is compared on its own.
"""

import zlib
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

REGIMES = {
    "one": lambda rng, shape: np.zeros(shape),
    "near_one": lambda rng, shape: np.log1p(-1e-4 * rng.uniform(size=shape)),
    "gla": lambda rng, shape: -np.logaddexp(0, -rng.normal(size=shape)) / 16,
    # Strong decays between weak ones: their sum over a chunk drowns the small differences.
    "mixed": lambda rng, shape: np.where(
        rng.uniform(size=shape) < 0.2, 0.0, -(10 ** rng.uniform(-4, np.log10(60), size=shape))
    ),
    "strong": lambda rng, shape: np.full(shape, -60.0),
    "sometimes_zero": lambda rng, shape: np.where(rng.uniform(size=shape) < 0.1, -np.inf, -rng.exponential(0.1, shape)),
    "zero": lambda rng, shape: np.full(shape, -np.inf),
}
EVERY_REGIME = tuple(REGIMES)


def _changes(batch: int, tokens: int, places: list[list[int]]) -> np.ndarray:
    """Ids that change before the tokens `places[row]`."""
    ids = np.zeros((batch, tokens), np.int32)
    for row in range(batch):
        for place in places[row % len(places)]:
            if place < tokens:
                ids[row, place:] += 1
    return ids


def segment_ids(pattern: str, batch: int, tokens: int, ranks: int = 1) -> np.ndarray:
    """Packed documents [B, T]; rows of a batch differ where the pattern allows."""
    shard = tokens // ranks
    if pattern == "odd_places":
        places = [[1, 2, tokens // 3, tokens // 2 + 1], [5, tokens - 1]]
    elif pattern == "one_token_documents":
        places = [list(range(1, tokens))]
    elif pattern == "rank_ends":
        places = [list(range(shard, tokens, shard)), list(range(shard - 1, tokens, shard))]
    elif pattern == "after_rank_starts":
        places = [list(range(shard + 1, tokens, shard)), [tokens // 2]]
    elif pattern == "one_document":
        return np.full((batch, tokens), 7, np.int32)
    elif pattern == "returning":
        return np.tile(np.repeat([1, 2, 1], -(-tokens // 3))[:tokens], (batch, 1)).astype(np.int32)
    elif pattern == "late":
        first = tokens - tokens // 3
        places = [[first, first + 1, first + 13, first + 14, tokens - 10]]
    elif pattern == "gaps":
        return _changes(batch, tokens, [[3, tokens // 2]]) * 1000 - 5
    else:
        raise ValueError(f"unknown pattern {pattern!r}")
    return _changes(batch, tokens, places)


@dataclass(frozen=True)
class Case:
    """One call of linear_attention and a loss: which outputs it sees."""

    name: str
    decay: str = "channel"  # none, head, token, channel
    regimes: tuple[str, ...] = ("gla", "gla")  # one per head
    tokens: int = 64
    batch: int = 2
    key_width: int = 16
    value_width: int = 16
    dtype: str = "float32"
    gate_dtype: str = "float32"
    initial_state: bool = True
    segments: str | None = None
    loss: tuple[str, ...] = ("out", "final_state")
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """One per regime."""
        return len(self.regimes)

    def tokens_on(self, ranks: int) -> int:
        """The next length that `ranks` divide."""
        return -(-self.tokens // ranks) * ranks


@dataclass(frozen=True)
class Arrays:
    """The arguments that have a gradient, the packing, and the cotangents of both outputs."""

    differentiable: dict[str, Any]
    segment_ids: np.ndarray | None
    dout: Any
    dfinal: Any


def arrays(case: Case, ranks: int = 1) -> Arrays:
    """Random arrays of the case, rounded to its dtypes."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    tokens = case.tokens_on(ranks)
    keys = (case.batch, tokens, case.heads, case.key_width)
    values = (case.batch, tokens, case.heads, case.value_width)
    states = (case.batch, case.heads, case.key_width, case.value_width)
    wide = "float64" if case.dtype == "float64" else "float32"

    differentiable = {
        "q": jnp.asarray(rng.normal(size=keys), case.dtype),
        "k": jnp.asarray(rng.normal(size=keys), case.dtype),
        "v": jnp.asarray(rng.normal(size=values), case.dtype),
    }
    if case.decay != "none":
        shape, head_axis = {"head": ((), 0), "token": (keys[:2], 2), "channel": ((*keys[:2], keys[3]), 2)}[case.decay]
        gates = np.stack([REGIMES[regime](rng, shape) for regime in case.regimes], head_axis)
        differentiable["log_decay"] = jnp.asarray(gates, case.gate_dtype)
    if case.initial_state:
        differentiable["initial_state"] = jnp.asarray(rng.normal(size=states), wide)
    return Arrays(
        differentiable=differentiable,
        segment_ids=None if case.segments is None else segment_ids(case.segments, case.batch, tokens, ranks),
        dout=jnp.asarray(rng.normal(size=values), case.dtype),
        dfinal=jnp.asarray(rng.normal(size=states), wide),
    )


def head_slices(name: str, array, heads: int) -> list:
    """The part of each head."""
    axis = {"final_state": 1, "initial_state": 1}.get(name, 2 if np.ndim(array) > 1 else 0)
    return [np.take(np.asarray(array, np.float64), head, axis) for head in range(heads)]


# `essential`: what every number of ranks, schedule and mesh is tried with; the rest runs once per backend or strategy.
ESSENTIAL = (
    Case("channel-every_regime", regimes=EVERY_REGIME, tokens=257, key_width=16, value_width=8),
    Case("token-packed", "token", ("near_one", "gla"), tokens=100, segments="rank_ends"),
    Case("head-packed", "head", ("near_one", "gla"), tokens=64, segments="odd_places"),
    Case("none-final_only", "none", tokens=7, loss=("final_state",)),
    Case("channel-out_only", regimes=("near_one",), tokens=64, initial_state=False, loss=("out",)),
)

FURTHER = (
    Case("none-odd_widths", "none", tokens=100, key_width=24, value_width=40, options={"scale": 0.3}),
    Case("head-every_regime", "head", EVERY_REGIME, tokens=100, key_width=24, value_width=40),
    Case("token-every_regime", "token", EVERY_REGIME, tokens=257, value_width=8, options={"chunk_size": 64}),
    Case("channel-small_chunks", regimes=EVERY_REGIME, tokens=100, value_width=24, options={"chunk_size": 16}),
    Case("channel-every_regime-packed", regimes=EVERY_REGIME, tokens=100, segments="odd_places"),
    Case("channel-one_token", tokens=1, key_width=24, value_width=40),
    Case("token-one_token-no_state", "token", tokens=1, initial_state=False, loss=("out",)),
    Case("token-seven_tokens", "token", ("mixed", "one"), tokens=7, batch=1, initial_state=False),
    Case("channel-final_only", regimes=("mixed", "gla"), loss=("final_state",), initial_state=False),
    Case("channel-one_token_documents", regimes=("mixed", "gla"), tokens=7, segments="one_token_documents"),
    Case("none-returning_document", "none", tokens=100, segments="returning", options={"chunk_size": 32}),
    Case("head-final_only-packed", "head", ("near_one", "gla"), segments="gaps", loss=("final_state",)),
    Case("token-one_document", "token", tokens=33, segments="one_document", loss=("out",)),
    Case("channel-after_starts", regimes=("near_one", "mixed"), tokens=64, segments="after_rank_starts"),
    Case("channel-wide", regimes=("gla",), batch=1, key_width=128, value_width=64),
    Case("token-long_memory", "token", ("near_one",), batch=1, tokens=1000, value_width=8),
)

BFLOAT16 = (
    Case("channel-every_regime-bf16", "channel", EVERY_REGIME, 257, key_width=24, value_width=40, dtype="bfloat16"),
    Case("none-bf16", "none", tokens=100, dtype="bfloat16"),
    Case("head-bf16", "head", ("near_one", "gla") * 4, 100, dtype="bfloat16", segments="odd_places"),
    Case("token-bf16", "token", ("near_one", "gla"), 100, dtype="bfloat16", gate_dtype="bfloat16"),
)

EVERY = ESSENTIAL + FURTHER + BFLOAT16
