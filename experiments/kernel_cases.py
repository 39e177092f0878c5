"""What experiments.kernels compares: shapes, decays, inputs for both, and the least time that they can take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

Decay = Literal["channel", "token", "head", "none"]
Direction = Literal["forward", "gradient"]


class Shape(NamedTuple):
    """Sizes of q and k, [batch, tokens, heads, key_width], and of v, [batch, tokens, heads, value_width]."""

    batch: int
    tokens: int
    heads: int
    key_width: int
    value_width: int


SHAPES = {
    "16k": Shape(1, 16384, 16, 128, 128),
    "32k": Shape(1, 32768, 16, 128, 128),
    "8x4k": Shape(8, 4096, 16, 128, 128),
    "4x8k-wide": Shape(4, 8192, 4, 256, 512),
    "64k-wide": Shape(1, 65536, 8, 128, 256),
    "16k-narrow": Shape(1, 16384, 32, 64, 64),
    "tiny": Shape(1, 256, 2, 16, 16),
    "tiny-wide": Shape(2, 150, 2, 16, 32),
}
"""By name; the tiny ones are for a CPU."""

CHUNK = 64
"""Tokens of the chunks whose products the floor counts."""
OPERAND_BYTES, GATE_BYTES = 2, 4
"""Widths of bfloat16 (q, k, v, outputs and their cotangents) and of float32 (gates)."""


@dataclass(frozen=True)
class Case:
    """One shape with one kind of decay.

    Attributes:
        name: the shape's name.
        shape: sizes.
        decay: gates per key channel [B, T, H, K], per token and head [B, T, H], constants per head [H], or none.
        gate_normalizer: gates are log sigmoid of a standard normal variable, over this.
    """

    name: str
    shape: Shape
    decay: Decay
    gate_normalizer: float = 16.0

    @property
    def label(self) -> str:
        """For tables and figures.

        Example:
            >>> Case("16k", SHAPES["16k"], "token").label
            '16k, decay: token'
        """
        return f"{self.name}, decay: {self.decay}"

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of linear_attention's arguments by name."""
        batch, tokens, heads, key_width, value_width = self.shape
        keys = (batch, tokens, heads, key_width)
        gates = {"channel": keys, "token": keys[:3], "head": (heads,)}
        shapes = {"q": keys, "k": keys, "v": (batch, tokens, heads, value_width)}
        return shapes if self.decay == "none" else shapes | {"log_decay": gates[self.decay]}

    @property
    def learned(self) -> tuple[str, ...]:
        """Arguments whose gradients are computed; decays per head are constants, as in retention and lightning."""
        return ("q", "k", "v", "log_decay") if self.decay in ("channel", "token") else ("q", "k", "v")

    def shortened(self, tokens: int) -> "Case":
        """One sequence of so many tokens, for the comparison with the oracle; the same for shapes that differ in T."""
        return Case(f"{tokens} tokens", self.shape._replace(batch=1, tokens=tokens), self.decay, self.gate_normalizer)


def head_decays(heads: int) -> np.ndarray:
    """The slopes of lightning attention in the middle of a deep model, [H] natural logarithms.

    Example:
        >>> head_decays(4)
        array([ 0., -1., -2., -3.], dtype=float32)
    """
    return (-(8 / heads) * 0.5 * np.arange(heads)).astype(np.float32) + np.float32(0)


def check_arrays(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Arguments of linear_attention and a `cotangent` of its output, in float32.

    All but gates are numbers that bfloat16 can hold, so that every contender gets the same.
    """
    rng = np.random.default_rng(seed)
    shapes = case.array_shapes
    arrays = {}
    for name, shape in (shapes | {"cotangent": shapes["v"]}).items():
        drawn = rng.standard_normal(shape, np.float32)
        if name != "log_decay":
            arrays[name] = drawn.astype(ml_dtypes.bfloat16).astype(np.float32)
        elif case.decay == "head":
            arrays[name] = head_decays(case.shape.heads)
        else:
            arrays[name] = -np.logaddexp(0, -drawn) / np.float32(case.gate_normalizer)
    return arrays


def relative_rms(got: np.ndarray, want: np.ndarray) -> float:
    """Root mean square of the difference, in units of the root mean square of `want`.

    Example:
        >>> relative_rms(np.array([3.0, 4.5]), np.array([3.0, 4.0]))
        0.1
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"got must have the shape {want.shape} of what it is compared with, got {got.shape}")
    return float(np.sqrt(np.sum((got - want) ** 2) / np.sum(want**2)))


def errors_of(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Relative RMS by the names that both have."""
    return {name: relative_rms(got[name], want[name]) for name in want if name in got}


def bytes_moved(case: Case, direction: Direction) -> int:
    """Bytes that must cross the device's memory when everything is read or written once.

    Forward: q, k, v, gates and the outputs. The gradient adds a second pass: the inputs and the outputs' cotangent are
    read, the cotangents of q, k, v and the gates are written.
    """
    sizes = {name: int(np.prod(shape)) for name, shape in case.array_shapes.items()}
    widths = {name: GATE_BYTES if name == "log_decay" else OPERAND_BYTES for name in sizes}
    inputs = sum(sizes[name] * widths[name] for name in sizes)
    outputs = sizes["v"] * OPERAND_BYTES
    if direction == "forward":
        return inputs + outputs
    cotangents = sum(sizes[name] * widths[name] for name in case.learned)
    return 2 * (inputs + outputs) + cotangents


def operations(shape: Shape, direction: Direction) -> int:
    """Multiplications and additions of the matrix products of the chunkwise form, with causal scores halved.

    Per token and head, with C = `CHUNK`: forward 4KV for the state (updated, and read by q) and C(K + V) for scores and
    what they select. Backwards 10KV (the state again, its cotangent, and what both give to q, k, v) and C(3K + 2V): the
    scores again, their cotangent, and what both give to q, k, v.
    """
    _, _, _, key_width, value_width = shape
    state = key_width * value_width
    per_token = 4 * state + CHUNK * (key_width + value_width)
    if direction == "gradient":
        per_token += 10 * state + CHUNK * (3 * key_width + 2 * value_width)
    return shape.batch * shape.tokens * shape.heads * per_token


@dataclass(frozen=True)
class Rates:
    """What this device delivers in a second: bytes read and written, and operations of bfloat16 matrix products."""

    bytes_per_second: float
    operations_per_second: float


class Floor(NamedTuple):
    """The least seconds that a case can take, and what sets them."""

    seconds: float
    limit: Literal["bytes", "operations"]


def floor_of(case: Case, direction: Direction, rates: Rates) -> Floor:
    """The longer of the two times.

    Example:
        >>> floor_of(Case("32k", SHAPES["32k"], "channel"), "forward", Rates(2.7e12, 7e14))
        Floor(seconds=0.000298..., limit='bytes')
    """
    moving = bytes_moved(case, direction) / rates.bytes_per_second
    computing = operations(case.shape, direction) / rates.operations_per_second
    return Floor(moving, "bytes") if moving >= computing else Floor(computing, "operations")
