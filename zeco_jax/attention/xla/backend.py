"""The chunkwise backend in plain XLA: runs everywhere, memory linear in T with a small constant."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zeco_jax.attention.backend import Backend, Gradients, Summary, total_decay
from zeco_jax.attention.gates import accumulation_dtype
from zeco_jax.attention.xla.stretch import (
    cut_chunks,
    join_chunks,
    stretch_inter,
    stretch_intra,
    stretch_replay,
    stretch_state_adjoint_by_chunks,
    stretch_state_by_chunks,
    stretch_summary,
    stretch_summary_adjoint,
)
from zeco_jax.platforms import platform_in_scope
from zeco_jax.varying import zeros_varying


class Tuning(NamedTuple):
    """How large the pieces are, by platform.

    Attributes:
        chunk_size: tokens per chunk: more of them mean fewer states and larger products, but more scores.
        stretch_elements: numbers of one operand that a stretch may hold: enough to fill the device, few beside T.
    """

    chunk_size: int
    stretch_elements: int


# Found by timing forward + backward of [1, 4096, 4, 64, 64] on 4 CPU cores and of [1, 16384, 16, 128, 128] and
# [8, 2048, 4, 128, 256] on an H100, chunks of 32 to 128 and stretches of 2^19 to 2^27 numbers. Twice the stretch is up
# to 1.3x faster on a GPU and takes up to twice the memory; on a CPU it makes no difference.
CPU_TUNING = Tuning(chunk_size=64, stretch_elements=1 << 20)
GPU_TUNING = Tuning(chunk_size=128, stretch_elements=1 << 25)
# By the cycles that the TPU compiler estimates for [1, 32768, 4, 256, 512] on v5p. Larger stretches gain 2% and compile
# twice as long; from 2^23 numbers on, libtpu 0.0.52 aborts ("split of a padded window dim").
TPU_TUNING = Tuning(chunk_size=128, stretch_elements=1 << 21)


def _tuning() -> Tuning:
    return {"cpu": CPU_TUNING, "tpu": TPU_TUNING}.get(platform_in_scope(), GPU_TUNING)


Arrays = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Partition:
    """How T tokens are cut: `stretches` stretches of `chunks` chunks of `chunk` tokens, the end filled up.

    Tokens of the filling have k = 0 and gate 0: they leave every state as it is.
    """

    tokens: int
    stretches: int
    chunks: int
    chunk: int

    @classmethod
    def of(cls, shape: tuple[int, ...], value_width: int, chunk_size: int | None) -> "Partition":
        """Chooses the stretches for q's shape [B, T, H, K]."""
        batch, tokens, heads, key_width = shape
        tuning = _tuning()
        chunk = min(chunk_size or tuning.chunk_size, 1 << (tokens - 1).bit_length())
        chunks = -(-tokens // chunk)
        most = max(1, tuning.stretch_elements // (batch * heads * max(key_width, value_width) * chunk))
        stretches = -(-chunks // most)
        return cls(tokens, stretches, -(-chunks // stretches), chunk)

    def pad(self, x: jax.Array) -> jax.Array:
        """Fills the tokens of x [B, T, ...] up with zeros."""
        missing = self.stretches * self.chunks * self.chunk - self.tokens
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x

    def walk(
        self,
        visit: Callable[[Any, Arrays], tuple[Any, Any]],
        carry: Any,
        arrays: Arrays,
        *,
        stacked: Any = (),
        reverse: bool = False,
    ) -> tuple[Any, Any]:
        """Visits the stretches in order, like `jax.lax.scan`.

        Args:
            visit: `(carry, (*stretch of each array [N, B, H, C, *], *entry of stacked)) -> (carry, results)`.
            carry: what the first visit gets.
            arrays: [B, T, H, *] each, cut into stretches in the accumulation dtype of the first.
            stacked: arrays with one entry for each stretch.
            reverse: visit the last stretch first.

        Returns:
            The last carry and the results, stacked as [stretches, ...].
        """
        length = self.chunks * self.chunk
        dtype = accumulation_dtype(arrays[0].dtype)
        padded = [self.pad(x) for x in arrays]

        def step(carry: Any, at: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            index, entries = at
            pieces = [
                cut_chunks(jax.lax.dynamic_slice_in_dim(x, index * length, length, axis=1), self.chunk).astype(dtype)
                for x in padded
            ]
            return visit(carry, (*pieces, *entries))

        if self.stretches == 1:
            carry, results = step(carry, (0, jax.tree.map(lambda x: x[0], stacked)))
            return carry, jax.tree.map(lambda x: x[None], results)
        return jax.lax.scan(step, carry, (jnp.arange(self.stretches), stacked), reverse=reverse)

    def join(self, x: jax.Array) -> jax.Array:
        """[stretches, N, B, H, C, *] -> [B, T, H, *], without the filling."""
        return join_chunks(x.reshape(-1, *x.shape[2:]))[:, : self.tokens]


@dataclass(frozen=True)
class XlaBackend(Backend):
    """Chunkwise linear attention as matrix products that XLA compiles for any device.

    T is walked in stretches: within one, all chunks are computed at once; from one to the next, only the state is
    carried. Backwards the stretches are replayed in reverse order, each differentiated from its entering state, so
    that nothing but one state per stretch outlives a stretch.
    """

    def _partition(self, k: jax.Array, v: jax.Array) -> Partition:
        return Partition.of(k.shape, v.shape[-1], self.chunk_size)

    def summarize(self, k: jax.Array, v: jax.Array, gates: jax.Array) -> Summary:
        """See `Backend.summarize`."""
        batch, _, heads, key_width = k.shape
        state = zeros_varying((batch, heads, key_width, v.shape[-1]), gates.dtype, like=k)
        partition = self._partition(k, v)
        if partition.stretches == 1:
            state, _ = partition.walk(
                lambda _, stretch: (stretch_state_by_chunks(*stretch, k.dtype), ()), state, (k, v, gates)
            )
        else:
            state, _ = self._stretch_states(k, v, gates, state)
        return Summary(total_decay(gates, state.shape), state)

    def _stretch_states(
        self, k: jax.Array, v: jax.Array, gates: jax.Array, state_in: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The state that leaves, and those that enter each stretch, [stretches, B, H, K, V]."""

        def visit(state: jax.Array, stretch: Arrays) -> tuple[jax.Array, jax.Array]:
            log_decay, added = stretch_summary(*stretch, k.dtype)
            return jnp.exp(log_decay)[..., None] * state + added, state

        return self._partition(k, v).walk(visit, state_in, (k, v, gates))

    def summarize_adjoint(self, q: jax.Array, gates: jax.Array, dout: jax.Array) -> jax.Array:
        """See `Backend.summarize_adjoint`."""
        batch, _, heads, key_width = q.shape
        dstate = zeros_varying((batch, heads, key_width, dout.shape[-1]), gates.dtype, like=q)

        def visit(dstate: jax.Array, stretch: Arrays) -> tuple[jax.Array, tuple[()]]:
            *inputs, cotangent = stretch
            if partition.stretches == 1:
                return stretch_state_adjoint_by_chunks(*inputs, self.scale * cotangent, q.dtype), ()
            log_decay, added = stretch_summary_adjoint(*inputs, self.scale * cotangent, q.dtype)
            return jnp.exp(log_decay)[..., None] * dstate + added, ()

        partition = self._partition(q, dout)
        return partition.walk(visit, dstate, (q, gates, dout), reverse=True)[0]

    def replay(
        self, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, state_in: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `Backend.replay`."""
        partition = self._partition(k, v)

        def visit(state: jax.Array, stretch: Arrays) -> tuple[jax.Array, jax.Array]:
            out, state = stretch_replay(*stretch, state, q.dtype)
            return state, (self.scale * out).astype(v.dtype)

        state_out, out = partition.walk(visit, state_in, (q, k, v, gates))
        return partition.join(out), state_out

    def replay_intra(self, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array) -> jax.Array | None:
        """See `Backend.replay_intra`: scores within chunks, applied to v, in the accumulation dtype.

        Not where all tokens make one stretch: a replay without a loop is free to begin with what needs no state.
        """
        partition = self._partition(k, v)
        if partition.stretches == 1:
            return None

        def visit(nothing: tuple[()], stretch: Arrays) -> tuple[tuple[()], jax.Array]:
            return nothing, self.scale * stretch_intra(*stretch, q.dtype)

        return partition.join(partition.walk(visit, (), (q, k, v, gates))[1])

    def replay_inter(
        self, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, state_in: jax.Array, intra: jax.Array
    ) -> jax.Array:
        """See `Backend.replay_inter`."""
        partition = self._partition(k, v)

        def visit(state: jax.Array, stretch: Arrays) -> tuple[jax.Array, jax.Array]:
            *inputs, out = stretch
            inter, state = stretch_inter(*inputs, state, q.dtype)
            return state, (out + self.scale * inter).astype(v.dtype)

        return partition.join(partition.walk(visit, state_in, (q, k, v, gates, intra))[1])

    def replay_adjoint(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        dout: jax.Array,
        dstate_out: jax.Array,
    ) -> tuple[Gradients, jax.Array]:
        """See `Backend.replay_adjoint`."""
        return self._replay_backwards(stretch_replay, q, k, v, gates, state_in, dout, dstate_out, None)

    def replay_intra_adjoint(
        self, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, state_in: jax.Array, dout: jax.Array
    ) -> Gradients | None:
        """The gradients of `replay_intra`, in the accumulation dtype, so that the sum is rounded once."""
        del state_in
        partition = self._partition(k, v)
        if partition.stretches == 1:
            return None

        def visit(nothing: tuple[()], stretch: Arrays) -> tuple[tuple[()], Arrays]:
            *inputs, cotangent = stretch
            _, pullback = jax.vjp(partial(stretch_intra, operand_dtype=q.dtype), *inputs)
            return nothing, pullback(self.scale * cotangent)

        _, pieces = partition.walk(visit, (), (q, k, v, gates, dout))
        return Gradients(*map(partition.join, pieces))

    def replay_inter_adjoint(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        dout: jax.Array,
        dstate_out: jax.Array,
        intra: Gradients | None,
    ) -> tuple[Gradients, jax.Array]:
        """See `Backend.replay_inter_adjoint`."""
        replay = stretch_replay if intra is None else stretch_inter
        return self._replay_backwards(replay, q, k, v, gates, state_in, dout, dstate_out, intra)

    def _replay_backwards(
        self,
        replay: Callable[..., tuple[jax.Array, jax.Array]],
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        dout: jax.Array,
        dstate_out: jax.Array,
        known: Gradients | None,
    ) -> tuple[Gradients, jax.Array]:
        """Differentiates `replay` stretch by stretch, from the last to the first, and adds gradients known already."""
        partition = self._partition(k, v)
        _, entering = self._stretch_states(k, v, gates, state_in)

        def visit(dstate: jax.Array, stretch: Arrays) -> tuple[jax.Array, Arrays]:
            *inputs, cotangent, state = stretch
            _, pullback = jax.vjp(partial(replay, operand_dtype=q.dtype), *inputs, state)
            *gradients, dstate = pullback((self.scale * cotangent, dstate))
            return dstate, tuple(gradients)

        dstate_in, pieces = partition.walk(visit, dstate_out, (q, k, v, gates, dout), stacked=(entering,), reverse=True)
        gradients = Gradients(*map(partition.join, pieces))
        if known is not None:
            gradients = jax.tree.map(jnp.add, gradients, known)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, Gradients(q, k, v, gates)), dstate_in
