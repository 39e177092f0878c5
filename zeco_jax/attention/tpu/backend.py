"""The chunkwise backend in kernels for TPUs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from zeco_jax.attention.backend import Backend, Call, Gradients, Summary, total_decay
from zeco_jax.attention.tpu.generations import SMALLEST, generation_of
from zeco_jax.attention.tpu.replay import replay_kernel
from zeco_jax.attention.tpu.replay_adjoint import replay_adjoint_kernel
from zeco_jax.attention.tpu.state_walk import state_walk_kernel
from zeco_jax.attention.tpu.tiling import LARGEST_CHUNK, Blocks, Tiling, choose_tiling
from zeco_jax.attention.tpu.token_decay import gate_sums, parts_of
from zeco_jax.attention.tpu.walk import walk_chunks
from zeco_jax.platforms import device_in_scope
from zeco_jax.varying import zeros_varying

_SERVED_DTYPES = (jnp.bfloat16, jnp.float32)

Input = tuple[jax.Array, Blocks]
Output = tuple[Blocks, jnp.dtype]


@dataclass(frozen=True)
class TpuBackend(Backend):
    """Chunkwise linear attention in Pallas kernels for TPUs: states stay in VMEM from chunk to chunk.

    Compiled for v4, v5e, v5p, v6e and TPU7x and simulated on the CPU; **not run on a real TPU**. A summary is one pass
    over k and v, a replay one pass over q, k and v. The adjoint of the replay is two: one forwards, which leaves the
    state that enters each chunk in HBM (in the type of q; as large as q where V = C), one backwards. See NOTES.md in
    this folder.

    Products are bfloat16 with float32 sums for bfloat16 inputs, float32 throughout for float32 inputs. Widths that are
    no multiple of 128 are filled up with zeros.

    `chunk_size` is kept between 16, a tile of bfloat16, and 256, beyond which there would be more scores and nothing
    saved; None means as many tokens as the matrix unit has rows.

    Attributes:
        heads_per_step: heads that a step of a kernel computes, at most; None for the backend's own choice.
        interpret: how to simulate the kernels; False compiles them.
    """

    heads_per_step: int | None = field(default=None, kw_only=True)
    interpret: bool | pltpu.InterpretParams = field(default=False, kw_only=True)

    def check(self, call: Call) -> None:
        """See `Backend.check`."""
        # Long enough for whole chunks, and gates of the kind that takes more room.
        self._cut(call, (1, LARGEST_CHUNK, 1, call.key_width), channel=True)

    def summarize(self, k: jax.Array, v: jax.Array, gates: jax.Array) -> Summary:
        """See `Backend.summarize`."""
        tiling = self._tiling(k, v, gates)
        (state,) = self._walk_states("summary", tiling, k, v, gates, _no_state(tiling, k))
        state = tiling.restore_state(state)
        return Summary(total_decay(gates, state.shape), state)

    def summarize_adjoint(self, q: jax.Array, gates: jax.Array, dout: jax.Array) -> jax.Array:
        """See `Backend.summarize_adjoint`."""
        tiling = self._tiling(q, dout, gates)
        (dstate,) = self._walk_states("summary_adjoint", tiling, q, dout, gates, _no_state(tiling, q), reverse=True)
        return tiling.restore_state(dstate)

    def replay(
        self, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, state_in: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `Backend.replay`."""
        tiling = self._tiling(q, v, gates)
        out, state_out = self._run(
            "replay",
            replay_kernel,
            tiling,
            [_keys(tiling, q), _keys(tiling, k), _values(tiling, v), _gates(tiling, gates), _state(tiling, state_in)],
            [(tiling.values(), v.dtype), (tiling.state(), jnp.float32)],
        )
        return tiling.restore_tokens(out, tiling.value_width), tiling.restore_state(state_out)

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
        tiling = self._tiling(q, v, gates)
        start = tiling.lay_out_state(state_in)
        _, entering = self._walk_states("states", tiling, k, v, gates, start, [(tiling.states(), k.dtype)])
        keys, values = tiling.keys(), tiling.values()
        dgates_blocks = keys if tiling.channel else tiling.numbers_per_token(tiling.batch, 1)
        dq, dk, dv, dgates, dstate_in = self._run(
            "replay_adjoint",
            replay_adjoint_kernel,
            tiling,
            [
                _keys(tiling, q),
                _keys(tiling, k),
                _values(tiling, v),
                _gates(tiling, gates),
                _values(tiling, dout.astype(v.dtype)),
                (entering, tiling.states()),
                _state(tiling, dstate_out),
            ],
            [
                (keys, q.dtype),
                (keys, k.dtype),
                (values, v.dtype),
                (dgates_blocks, jnp.float32),
                (tiling.state(), jnp.float32),
            ],
            reverse=True,
        )
        if tiling.channel:
            dgates = tiling.restore_tokens(dgates, tiling.key_width)
        else:
            dgates = tiling.restore_numbers(dgates)[..., None]
        if gates.shape[0] < tiling.batch:
            dgates = jnp.sum(dgates, axis=0, keepdims=True)
        gradients = Gradients(
            tiling.restore_tokens(dq, tiling.key_width),
            tiling.restore_tokens(dk, tiling.key_width),
            tiling.restore_tokens(dv, tiling.value_width),
            dgates,
        )
        return gradients, tiling.restore_state(dstate_in)

    def _walk_states(
        self,
        name: str,
        tiling: Tiling,
        x: jax.Array,
        y: jax.Array,
        gates: jax.Array,
        start: jax.Array,
        entering: Sequence[Output] = (),
        *,
        reverse: bool = False,
    ) -> list[jax.Array]:
        """The state that leaves the walk and, if asked for, those that enter the chunks."""
        state = tiling.state()
        return self._run(
            name,
            partial(state_walk_kernel, reverse=reverse),
            tiling,
            [_keys(tiling, x), _values(tiling, y.astype(x.dtype)), _gates(tiling, gates), (start, state)],
            [(state, jnp.float32), *entering],
            reverse=reverse,
        )

    def _run(
        self,
        name: str,
        kernel: Callable[..., None],
        tiling: Tiling,
        inputs: Sequence[Input],
        outputs: Sequence[Output],
        *,
        reverse: bool = False,
    ) -> list[jax.Array]:
        kernel = partial(kernel, tiling=tiling, scale=self.scale)
        return walk_chunks(name, kernel, tiling, inputs, outputs, reverse=reverse, interpret=self.interpret)

    def _tiling(self, x: jax.Array, y: jax.Array, gates: jax.Array) -> Tiling:
        return self._cut(Call(x.dtype, x.shape[-1], y.shape[-1]), x.shape, channel=gates.shape[-1] > 1)

    def _cut(self, call: Call, shape: tuple[int, ...], *, channel: bool) -> Tiling:
        """The cut of a call with queries of `shape`, or the reason why there is none."""
        if call.dtype not in _SERVED_DTYPES:
            raise NotImplementedError(f"the kernels take bfloat16 or float32, not q, k and v of {call.dtype}")
        device = device_in_scope()
        if device.platform != "tpu" and not self.interpret:
            raise NotImplementedError(f"the kernels need a TPU, this is {device.platform} ({device.kind})")
        return choose_tiling(
            shape,
            call.value_width,
            channel=channel,
            dtype=call.dtype,
            chunk_size=self.chunk_size,
            heads_per_step=self.heads_per_step,
            generation=generation_of(device.kind) if device.platform == "tpu" else SMALLEST,
        )


def _keys(tiling: Tiling, x: jax.Array) -> Input:
    return tiling.lay_out_tokens(x, tiling.key_lanes), tiling.keys()


def _values(tiling: Tiling, x: jax.Array) -> Input:
    return tiling.lay_out_tokens(x, tiling.value_lanes), tiling.values()


def _state(tiling: Tiling, state: jax.Array) -> Input:
    return tiling.lay_out_state(state), tiling.state()


def _no_state(tiling: Tiling, like: jax.Array) -> jax.Array:
    return zeros_varying(tiling.state().shape, jnp.float32, like)


def _gates(tiling: Tiling, gates: jax.Array) -> Input:
    """Gates [B or 1, T, H, K or 1] as `visit_heads` wants them."""
    if tiling.channel:
        return tiling.lay_out_tokens(gates, tiling.key_lanes), tiling.keys(gates.shape[0])
    parts = parts_of(tiling.dtype)
    # [parts, B or 1, H / heads, N, heads, C] -> [B or 1, H / heads, N, parts heads, C]
    sums = jnp.moveaxis(gate_sums(tiling.lay_out_numbers(gates[..., 0]), parts), 0, 3)
    return sums.reshape(*sums.shape[:3], -1, tiling.chunk), tiling.numbers_per_token(gates.shape[0], parts)
