"""What each kernel has to do: the products of the chunkwise form, and the bytes that pass through HBM."""

from dataclasses import dataclass

from zeco_jax.attention.tpu.tiling import Tiling

_GATE_BYTES = 4


@dataclass(frozen=True)
class Work:
    """The work on one chunk of one head, whatever way the decays are applied.

    Attributes:
        key_arrays: arrays as wide as the keys that are read or written.
        value_arrays: likewise as the values.
        gate_arrays: likewise of gates.
        states: states that are read or written at each chunk.
        key_squares: products of [C, C] with [C, K], or that result in [C, C] from [C, K].
        value_squares: likewise with [C, V].
        state_products: products with or into a state.
    """

    key_arrays: int
    value_arrays: int
    gate_arrays: int
    states: int
    key_squares: int
    value_squares: int
    state_products: int

    def products(self, tiling: Tiling) -> int:
        """Multiplications."""
        chunk, keys, values = tiling.chunk, tiling.key_lanes, tiling.value_lanes
        squares = chunk * chunk * (self.key_squares * keys + self.value_squares * values)
        return squares + self.state_products * chunk * keys * values

    def bytes(self, tiling: Tiling) -> int:
        """Read and written."""
        size, keys, values = tiling.dtype.itemsize, tiling.key_lanes, tiling.value_lanes
        gates = _GATE_BYTES * self.gate_arrays * (keys if tiling.channel else 1)
        tokens = size * (self.key_arrays * keys + self.value_arrays * values) + gates
        return tiling.chunk * tokens + self.states * size * keys * values


KERNELS = {
    "summary": Work(1, 1, 1, 0, key_squares=0, value_squares=0, state_products=1),
    "summary_adjoint": Work(1, 1, 1, 0, key_squares=0, value_squares=0, state_products=1),
    "replay": Work(2, 2, 1, 0, key_squares=1, value_squares=1, state_products=2),
    "states": Work(1, 1, 1, 1, key_squares=0, value_squares=0, state_products=1),
    "replay_adjoint": Work(4, 3, 2, 1, key_squares=3, value_squares=2, state_products=4),
}
"""By the name of the kernel, behind `linear_attention_` in profiles and dumps."""
