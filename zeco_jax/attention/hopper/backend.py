"""Linear attention by Mosaic GPU kernels for Hopper: two levels of summaries, stretches of chunks."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from zeco_jax.attention.backend import Backend, Call, Gradients, Summary, checkpointed
from zeco_jax.attention.hopper.channel import ChannelDecays
from zeco_jax.attention.hopper.decayed_replay import Decayed
from zeco_jax.attention.hopper.plan import stretches
from zeco_jax.attention.hopper.replayed import States
from zeco_jax.attention.hopper.scalar import ScalarDecays
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, HALF, TILE
from zeco_jax.attention.hopper.walk import Walk
from zeco_jax.attention.hopper.wide_channel import WideChannelDecays
from zeco_jax.attention.hopper.wide_scalar import WideScalarDecays
from zeco_jax.platforms import device_in_scope

_WIDEST_KEY = 256
_WIDEST_VALUE = 512


@dataclass(frozen=True)
class HopperBackend(Backend):
    """Mosaic GPU kernels for H100 and H200: bfloat16 in and out, float32 gates, sums and states.

    The sequence is cut into as many stretches as fill the machine. One pass summarises them, a scan over their
    summaries gives the state that enters each, one pass replays them. See NOTES.md in this folder.

    Attributes:
        interpret: simulate the kernels, on any device.
    """

    takes_infinite_gates: ClassVar[bool] = True

    interpret: bool = field(default=False, kw_only=True)

    def check(self, call: Call) -> None:
        """Raises NotImplementedError with the reason if the kernels can't serve the call."""
        if call.dtype != jnp.bfloat16:
            raise NotImplementedError(f"the kernels take bfloat16 queries, keys and values, not {call.dtype}")
        if call.key_width > _WIDEST_KEY or call.value_width > _WIDEST_VALUE:
            raise NotImplementedError(
                f"heads of at most {_WIDEST_KEY} key and {_WIDEST_VALUE} value channels, not "
                f"{call.key_width} and {call.value_width}"
            )
        if self.chunk_size not in (None, CHUNK):
            raise NotImplementedError(f"chunks of {CHUNK} tokens, not {self.chunk_size}")
        device = device_in_scope()
        if not self.interpret and not (device.platform == "gpu" and ("H100" in device.kind or "H200" in device.kind)):
            raise NotImplementedError(f"the kernels are for H100 and H200 GPUs, not {device.platform} ({device.kind})")

    def prepare(self, k: jax.Array, v: jax.Array, gates: jax.Array) -> "_Summaries":
        """The summaries of the stretches."""
        return self._work(k, v, gates).summaries()

    def prepare_adjoint(self, q: jax.Array, gates: jax.Array, dout: jax.Array) -> "_Summaries":
        """The summaries of the stretches, walked backwards."""
        return self._work(q, dout, gates).summaries(reverse=True, scale=self.scale)

    def _work(self, keys: jax.Array, values: jax.Array, gates: jax.Array) -> "_Work":
        return _Work.of(keys, values, gates, interpret=self.interpret)

    def summarize(
        self, k: jax.Array, v: jax.Array, gates: jax.Array, *, prepared: "_Summaries | None" = None
    ) -> Summary:
        """What the tokens do to a state; needs no state from outside."""
        prepared = prepared or self.prepare(k, v, gates)
        state = prepared.enter(jnp.zeros_like(prepared.states[:, :, 0]))[1]
        decay = jnp.exp(jnp.sum(_by_head(prepared.gates, state.shape[1]), axis=2))
        decay = jnp.broadcast_to(decay, state.shape[:-1])
        return Summary(decay[..., : k.shape[-1]], state[..., : k.shape[-1], : v.shape[-1]])

    def replay(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        *,
        prepared: "_Summaries | None" = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The outputs [B, T, H, V] in v's dtype and the state that leaves."""
        return self.replay_keeping(q, k, v, gates, state_in, prepared=prepared, keep_states=False)[0]

    def replay_keeping(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        *,
        prepared: "_Summaries | None" = None,
        intra: Decayed | None = None,
        keep_states: bool = True,
    ) -> tuple[tuple[jax.Array, jax.Array], dict[str, Any]]:
        """As `replay`; keeps summaries, what was decayed, and the chunks' states where the kernel can write them."""
        work = self._work(k, v, gates)
        if prepared is None:
            intra = intra or work.decays.intra(work.pack(q), work.keys, self.scale)
            prepared = checkpointed("attention_summaries", work.summaries(intra=intra, needed=False))
        entering, state_out = prepared.enter(work.pad_state(state_in))
        out, left, states = work.decays.replay(
            work.pack(q),
            work.keys,
            work.values,
            entering,
            prepared.walk,
            self.scale,
            intra=intra,
            keep_states=keep_states,
        )
        results = work.cut(out, work.value_width), work.cut_state(state_out if left is None else left)
        kept = {"prepared": prepared}
        if intra is not None:
            kept["decayed"] = intra
        if states is not None:
            kept["states"] = checkpointed("attention_states", states)
        return results, kept

    def replay_intra(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        *,
        prepared: "_Summaries | None" = None,
    ) -> Decayed | None:
        """With states of several tiles: queries, keys and scores, decayed."""
        del prepared
        work = self._work(k, v, gates)
        return work.decays.intra(work.pack(q), work.keys, self.scale)

    def replay_inter(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        intra: Decayed,
        *,
        prepared: "_Summaries | None" = None,
    ) -> jax.Array:
        """The outputs, given the entering state and what `replay_intra` returned."""
        kept = self.replay_keeping(q, k, v, gates, state_in, prepared=prepared, intra=intra, keep_states=False)
        return kept[0][0]

    def summarize_adjoint(
        self, q: jax.Array, gates: jax.Array, dout: jax.Array, *, prepared_adjoint: "_Summaries | None" = None
    ) -> jax.Array:
        """The cotangent of the entering state that comes from the outputs alone, [B, H, K, V]."""
        prepared = prepared_adjoint or self.prepare_adjoint(q, gates, dout)
        state = prepared.enter(jnp.zeros_like(prepared.states[:, :, 0]))[1]
        return state[..., : q.shape[-1], : dout.shape[-1]]

    def replay_adjoint(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        dout: jax.Array,
        dstate_out: jax.Array,
        **prepared: Any,
    ) -> tuple[Gradients, jax.Array]:
        """The gradients of `replay` for cotangents of both results, and the cotangent of the entering state."""
        states, decayed = self._before_gradients(q, k, v, gates, state_in, **prepared)
        return self._gradients(q, k, v, gates, dout, dstate_out, states, decayed, prepared.get("prepared_adjoint"))

    def replay_intra_adjoint(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        dout: jax.Array,
        **prepared: Any,
    ) -> "_BeforeGradients":
        """The chunks' states, computed unless they were kept, and what `replay_intra` gives."""
        del dout
        states, decayed = self._before_gradients(q, k, v, gates, state_in, **prepared)
        return _BeforeGradients(states(), decayed)

    def replay_inter_adjoint(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        dout: jax.Array,
        dstate_out: jax.Array,
        intra: "_BeforeGradients",
        *,
        prepared_adjoint: "_Summaries | None" = None,
        **prepared: Any,
    ) -> tuple[Gradients, jax.Array]:
        """The gradients of the whole replay, given what `replay_intra_adjoint` returned."""
        del state_in, prepared
        return self._gradients(
            q, k, v, gates, dout, dstate_out, lambda *_: intra.states, intra.decayed, prepared_adjoint
        )

    def _before_gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        *,
        prepared: "_Summaries | None" = None,
        prepared_adjoint: "_Summaries | None" = None,
        decayed: Decayed | None = None,
        states: jax.Array | None = None,
    ) -> tuple[States, Decayed | None]:
        del prepared_adjoint
        work = self._work(k, v, gates)
        decayed = decayed or work.decays.intra(work.pack(q), work.keys, self.scale)
        if states is not None:
            return lambda *_: states, decayed
        prepared = prepared or self.prepare(k, v, gates)
        entering, _ = prepared.enter(work.pad_state(state_in))

        def compute(*earlier: jax.Array) -> jax.Array:
            waiting, *_ = lax.optimization_barrier((entering, *earlier))
            return work.decays.chunk_states(work.keys, work.values, waiting, prepared.walk, decayed)

        return compute, decayed

    def _gradients(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        dout: jax.Array,
        dstate_out: jax.Array,
        states: States,
        decayed: Decayed | None,
        later: "_Summaries | None",
    ) -> tuple[Gradients, jax.Array]:
        work = self._work(k, v, gates)
        later = later or self._work(q, dout, gates).summaries(
            reverse=True, scale=self.scale, intra=decayed, needed=False
        )
        leaving, dstate_in = later.enter(work.pad_state(dstate_out))
        (dq, dk, dv, dgates), left = work.decays.gradients(
            work.pack(q),
            work.keys,
            work.values,
            work.pack(dout.astype(v.dtype)),
            states,
            leaving,
            later.walk,
            self.scale,
            decayed,
        )
        dgates = work.cut(dgates, gates.shape[-1])
        if gates.shape[0] < dgates.shape[0]:
            dgates = jnp.sum(dgates, axis=0, keepdims=True)
        gradients = Gradients(
            work.cut(dq, work.key_width), work.cut(dk, work.key_width), work.cut(dv, work.value_width), dgates
        )
        return gradients, work.cut_state(dstate_in if left is None else left)


class _BeforeGradients(NamedTuple):
    """The states that enter the chunks [B, H, chunks, K, V], and what `replay_intra` gives."""

    states: jax.Array
    decayed: Decayed | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Summaries:
    """What stretches do to a state.

    Attributes:
        states: [B, H, summarized, K, V], what the summarized stretches leave of a state of zeros; None without any.
        gates: [B or 1, H, summarized, K or 1], the sums of their gates; of paired heads side by side. None without any.
        walk: the stretches.
    """

    states: jax.Array | None
    gates: jax.Array | None
    walk: Walk = field(metadata={"static": True})

    def enter(self, first: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The states that enter the stretches, from that of the first one walked; and what leaves, unless closed."""
        walk = self.walk
        order = -1 if walk.reverse else 1
        entered = [first]
        if walk.summarized:
            decays = jnp.exp(_by_head(self.gates, first.shape[1]))
            # Not a scan: unrolled, XLA makes one kernel of it.
            for index in range(len(walk.summarized))[::order]:
                entered.append(decays[:, :, index, :, None] * entered[-1] + self.states[:, :, index])
        last = None if walk.closed else entered.pop()
        return jnp.stack(entered[::order], axis=2), last


class _Work(NamedTuple):
    """Arrays in whole chunks and tiles, and what they were before.

    Heads of at most half a tile are paired where their number is even: two of them lie side by side in a tile.
    """

    keys: jax.Array
    values: jax.Array
    decays: ChannelDecays | WideChannelDecays | ScalarDecays
    tokens: int
    heads: int
    key_width: int
    value_width: int

    @classmethod
    def of(cls, keys: jax.Array, values: jax.Array, gates: jax.Array, *, interpret: bool) -> "_Work":
        """Pads keys and values with zeros that add nothing, and gates."""
        _, tokens, heads, key_width = keys.shape
        value_width = values.shape[-1]
        paired = max(key_width, value_width) <= HALF and heads % COMPUTING == 0
        keys, values = _pack(keys, paired), _pack(values, paired)
        is_wide = max(keys.shape[-1], values.shape[-1]) > TILE
        if gates.shape[-1] == 1:
            decays = (WideScalarDecays if is_wide else ScalarDecays).of(gates, interpret, paired)
        elif is_wide:
            decays = WideChannelDecays(_pack_gates(gates, paired), interpret)
        else:
            decays = ChannelDecays(_pack_gates(gates, paired), interpret, paired)
        return cls(keys, values, decays, tokens, heads, key_width, value_width)

    @property
    def paired(self) -> bool:
        """Whether a tile is two heads."""
        return self.keys.shape[2] < self.heads

    def pack(self, x: jax.Array) -> jax.Array:
        """[B, T, H, K or V] as keys and values are here."""
        return _pack(x, self.paired)

    def summaries(
        self, *, reverse: bool = False, scale: float = 1.0, intra: Decayed | None = None, needed: bool = True
    ) -> _Summaries:
        """What the stretches do to a state.

        Args:
            reverse: walked backwards.
            scale: factor on the states.
            intra: what `replay_intra` returned; without it what is decayed for it is decayed once more.
            needed: others than the replay need what all of them leave.
        """
        batch, tokens, heads, _ = self.keys.shape
        # The replay takes all keys together.
        blocks = batch * heads * (self.values.shape[-1] // TILE)
        count = stretches(blocks, tokens // CHUNK)
        walk = Walk(tokens // CHUNK, count, reverse, closed=not needed)
        if not walk.summarized:
            return _Summaries(None, None, walk)
        return _Summaries(*self.decays.stretch_states(self.keys, self.values, walk, scale, intra), walk)

    def pad_state(self, state: jax.Array) -> jax.Array:
        """[B, H, K, V] in whole tiles."""
        widths = [(0, 0), (0, 0), *((0, -width % _lane(self.paired)) for width in state.shape[2:])]
        return jnp.pad(state, widths)

    def cut_state(self, state: jax.Array) -> jax.Array:
        """[B, H, K, V] without what was added."""
        return state[:, :, : self.key_width, : self.value_width]

    def cut(self, x: jax.Array, width: int) -> jax.Array:
        """[B, T, H, width] without what was added."""
        return x.reshape(*x.shape[:2], self.heads, -1)[:, : self.tokens, :, :width]


def _lane(paired: bool) -> int:
    """What widths of heads are multiples of."""
    return HALF if paired else TILE


def _pack(x: jax.Array, paired: bool) -> jax.Array:
    """[B, T, H, width] in whole chunks of tokens and tiles of channels."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % CHUNK), (0, 0), (0, -x.shape[3] % _lane(paired))))
    return x.reshape(*x.shape[:2], -1, TILE) if paired else x


def _pack_gates(gates: jax.Array, paired: bool) -> jax.Array:
    """As `_pack`; channels that are added decay as the last one, so that what cuts all of them still does."""
    widths = ((0, 0), (0, 0), (0, 0), (0, -gates.shape[3] % _lane(paired)))
    return _pack(jnp.pad(gates, widths, mode="edge"), paired)


def _by_head(x: jax.Array, heads: int) -> jax.Array:
    """[B, H, n, K], from the same with K of two heads side by side where they are paired."""
    if x.shape[1] == heads:
        return x
    batch, tiles, count, width = x.shape
    by_half = x.reshape(batch, tiles, count, COMPUTING, width // COMPUTING)
    return jnp.moveaxis(by_half, 3, 2).reshape(batch, heads, count, -1)
