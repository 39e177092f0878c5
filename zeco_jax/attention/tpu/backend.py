"""The chunkwise backend in kernels for TPUs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from zeco_jax.attention.backend import Backend, Gradients, Summary, total_decay
from zeco_jax.attention.tpu.generations import device_in_scope, vmem_budget
from zeco_jax.attention.tpu.replay import replay_kernel
from zeco_jax.attention.tpu.replay_adjoint import replay_adjoint_kernel
from zeco_jax.attention.tpu.state_walk import state_walk_kernel
from zeco_jax.attention.tpu.tiling import Blocks, Tiling, choose_tiling
from zeco_jax.attention.tpu.token_decay import gate_sums, parts_of
from zeco_jax.attention.tpu.walk import walk_chunks
from zeco_jax.varying import zeros_varying

_SERVED_DTYPES = (jnp.bfloat16, jnp.float32)


@dataclass(frozen=True)
class TpuBackend(Backend):
    """Chunkwise linear attention in Pallas kernels for TPUs: states stay in VMEM from chunk to chunk.

    Compiled for v5e, v5p, v6e and TPU7x and simulated on the CPU; **not run on a real TPU**. A summary is one pass over
    k and v, a replay one pass over q, k and v. The adjoint of the replay is two: one forwards, which leaves the state
    that enters each chunk in HBM (in the type of q; as large as q where K = V = C), one backwards.

    Products are bfloat16 with float32 sums for bfloat16 inputs, float32 throughout for float32 inputs. Widths that are
    no multiple of 128 are filled up with zeros.

    Attributes:
        interpret: how to simulate the kernels; False compiles them.
    """

    interpret: bool | pltpu.InterpretParams = False

    def summarize(self, k: jax.Array, v: jax.Array, gates: jax.Array) -> Summary:
        """See `Backend.summarize`."""
        tiling = self._tiling(k, v, gates)
        start = self._no_state(tiling, k)
        state, *_ = self._walk_states(tiling, k, v, gates, start)
        state = tiling.restore_state(state)
        return Summary(total_decay(gates, state.shape), state)

    def summarize_adjoint(self, q: jax.Array, gates: jax.Array, dout: jax.Array) -> jax.Array:
        """See `Backend.summarize_adjoint`."""
        tiling = self._tiling(q, dout, gates)
        dstate, *_ = self._walk_states(tiling, q, dout, gates, self._no_state(tiling, q), reverse=True)
        return tiling.restore_state(dstate)

    def replay(
        self, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, state_in: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `Backend.replay`."""
        tiling = self._tiling(q, v, gates)
        keys, values, state = tiling.keys(), tiling.values(), tiling.state()
        out, state_out = self._run(
            partial(replay_kernel, scale=self.scale),
            tiling,
            [
                (tiling.lay_out_tokens(q, tiling.key_lanes), keys),
                (tiling.lay_out_tokens(k, tiling.key_lanes), keys),
                (tiling.lay_out_tokens(v, tiling.value_lanes), values),
                _gates(tiling, gates),
                (tiling.lay_out_state(state_in), state),
            ],
            [(values, v.dtype), (state, jnp.float32)],
            products=(tiling.chunk + tiling.value_lanes) * tiling.chunk * tiling.key_lanes
            + (tiling.chunk + tiling.key_lanes) * tiling.chunk * tiling.value_lanes,
            name="linear_attention_replay",
        )
        return tiling.restore_tokens(out, v.shape[-1]), tiling.restore_state(state_out)

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
        keys, values, state = tiling.keys(), tiling.values(), tiling.state()
        _, entering = self._walk_states(tiling, k, v, gates, tiling.lay_out_state(state_in), entering=True)
        dgates_blocks = keys if tiling.channel else tiling.numbers_per_token(tiling.batch, 1)
        dq, dk, dv, dgates, dstate_in = self._run(
            partial(replay_adjoint_kernel, scale=self.scale),
            tiling,
            [
                (tiling.lay_out_tokens(q, tiling.key_lanes), keys),
                (tiling.lay_out_tokens(k, tiling.key_lanes), keys),
                (tiling.lay_out_tokens(v, tiling.value_lanes), values),
                _gates(tiling, gates),
                (tiling.lay_out_tokens(dout.astype(v.dtype), tiling.value_lanes), values),
                (entering, tiling.states()),
                (tiling.lay_out_state(dstate_out), state),
            ],
            [(keys, q.dtype), (keys, k.dtype), (values, v.dtype), (dgates_blocks, jnp.float32), (state, jnp.float32)],
            products=(3 * tiling.chunk + 2 * tiling.value_lanes) * tiling.chunk * tiling.key_lanes
            + (2 * tiling.chunk + 2 * tiling.key_lanes) * tiling.chunk * tiling.value_lanes,
            reverse=True,
            name="linear_attention_replay_adjoint",
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
        tiling: Tiling,
        x: jax.Array,
        y: jax.Array,
        gates: jax.Array,
        start: jax.Array,
        *,
        entering: bool = False,
        reverse: bool = False,
    ) -> list[jax.Array]:
        """The state that leaves the walk and, with `entering`, those that enter the chunks."""
        state = tiling.state()
        return self._run(
            partial(state_walk_kernel, scale=self.scale, reverse=reverse),
            tiling,
            [
                (tiling.lay_out_tokens(x, tiling.key_lanes), tiling.keys()),
                (tiling.lay_out_tokens(y.astype(x.dtype), tiling.value_lanes), tiling.values()),
                _gates(tiling, gates),
                (start, state),
            ],
            [(state, jnp.float32)] + [(tiling.states(), x.dtype)] * entering,
            products=tiling.chunk * tiling.key_lanes * tiling.value_lanes,
            reverse=reverse,
            name="linear_attention_summary_adjoint" if reverse else "linear_attention_summary",
        )

    def _run(
        self,
        kernel: Callable[..., None],
        tiling: Tiling,
        inputs: list[tuple[jax.Array, Blocks]],
        outputs: list[tuple[Blocks, jnp.dtype]],
        *,
        products: int,
        name: str,
        reverse: bool = False,
    ) -> list[jax.Array]:
        return walk_chunks(
            kernel,
            tiling,
            inputs,
            outputs,
            products=products,
            reverse=reverse,
            interpret=self.interpret,
            name=name,
        )

    def _tiling(self, x: jax.Array, y: jax.Array, gates: jax.Array) -> Tiling:
        """The cut, or the reason why there is none."""
        if x.dtype not in _SERVED_DTYPES:
            raise NotImplementedError(f'backend "tpu" multiplies bfloat16 or float32, q, k and v are {x.dtype}')
        platform, device_kind = device_in_scope()
        if platform != "tpu" and not self.interpret:
            raise NotImplementedError(f'backend "tpu" needs a TPU, this is platform {platform!r}')
        return choose_tiling(
            x.shape,
            y.shape[-1],
            channel=gates.shape[-1] > 1,
            dtype=x.dtype,
            chunk_size=self.chunk_size,
            vmem_bytes=vmem_budget(device_kind if platform == "tpu" else None),
        )

    def _no_state(self, tiling: Tiling, like: jax.Array) -> jax.Array:
        return zeros_varying(tiling.state().shape, jnp.float32, like)


def _gates(tiling: Tiling, gates: jax.Array) -> tuple[jax.Array, Blocks]:
    """Gates [B or 1, T, H, K or 1] as `read_decays` wants them."""
    if tiling.channel:
        return tiling.lay_out_tokens(gates, tiling.key_lanes), tiling.keys(gates.shape[0])
    parts = parts_of(tiling.dtype)
    # [parts, B or 1, H / heads, N, heads, C] -> [B or 1, H / heads, N, parts heads, C]
    sums = jnp.moveaxis(gate_sums(tiling.lay_out_numbers(gates[..., 0]), parts), 0, 3)
    return sums.reshape(*sums.shape[:3], -1, tiling.chunk), tiling.numbers_per_token(gates.shape[0], parts)
