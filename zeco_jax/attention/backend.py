"""The seam between kernels and meshes: what a backend computes on one device's arrays."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


class Summary(NamedTuple):
    """What a stretch of tokens does to a state: `state_out = decay . state_in + state`.

    Attributes:
        decay: [B, H, K], linear, in [0, 1].
        state: [B, H, K, V], the state that the stretch leaves when none enters it.
    """

    decay: jax.Array
    state: jax.Array

    def leave(self, state_in: jax.Array) -> jax.Array:
        """The state that leaves the stretch when `state_in` enters it."""
        return self.decay[..., None] * state_in + self.state


class Gradients(NamedTuple):
    """Cotangents of q, k, v and the gates, in the shapes and dtypes of what they belong to."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gates: jax.Array


def checkpointed[Kept](name: str, kept: Kept) -> Kept:
    """Arrays under a name by which rematerialisation can keep them, for whoever computes with them, too."""
    return jax.tree.map(partial(checkpoint_name, name=name), kept)


def total_decay(gates: jax.Array, state_shape: tuple[int, ...]) -> jax.Array:
    """The decay of a whole stretch, [B, H, K], from its gates [B or 1, T, H, K or 1]."""
    return jnp.broadcast_to(jnp.exp(jnp.sum(gates, axis=1)), state_shape[:-1])


class Call(NamedTuple):
    """What a backend must know of a call to say whether it can serve it.

    Attributes:
        dtype: the common one of q, k and v.
        key_width: K.
        value_width: V.
    """

    dtype: jnp.dtype
    key_width: int
    value_width: int

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, v: jax.Array) -> "Call":
        """The call with these arrays."""
        return cls(jnp.result_type(q, k, v), q.shape[-1], v.shape[-1])


@dataclass(frozen=True)
class Backend(ABC):
    r"""Chunkwise linear attention on one device, as the pure functions that an exchange between devices needs.

    Arrays: q, k [B, T, H, K]; v [B, T, H, V]; gates [B or 1, T, H, K or 1] float32, finite, <= 0 (see
    `normalize_gates`); states [B, H, K, V] float32 (float64 for float64 inputs). The recurrence is

    .. math:: S_t = e^{g_t} \odot S_{t-1} + k_t v_t^\top, \qquad o_t = \text{scale} \cdot q_t S_t

    A replay may be cut in two: `replay_intra` needs no entering state and so can run while that state is on its way,
    `replay_inter` adds what depends on it. A backend for which the cut doesn't pay leaves everything to `replay`.

    Attributes:
        takes_infinite_gates: whether gates may be -inf; else they come clamped at `LOG_ZERO`.
        scale: factor on the outputs.
        chunk_size: tokens per chunk, or None for the backend's own choice.
    """

    takes_infinite_gates: ClassVar[bool] = False

    scale: float = 1.0
    chunk_size: int | None = None

    def check(self, call: Call) -> None:
        """Raises NotImplementedError with the reason if this backend can't serve the call."""
        del call

    def prepare(self, k: jax.Array, v: jax.Array, gates: jax.Array) -> Any:
        """What `summarize`, `replay` and the gradients have in common, or None.

        A backend that returns something takes it back, as the keyword `prepared` of `summarize`, and of `replay`, its
        parts and their adjoints; where nothing is exchanged, `replay_keeping` does what it likes and returns it.
        Rematerialisation keeps it: it should be small beside the outputs.
        """
        del k, v, gates

    def prepare_adjoint(self, q: jax.Array, gates: jax.Array, dout: jax.Array) -> Any:
        """What `summarize_adjoint` and `replay_adjoint` have in common, or None; asked for where there is an exchange.

        Taken back as the keyword `prepared_adjoint` by both, and by the parts of the latter.
        """
        del q, gates, dout

    @abstractmethod
    def summarize(self, k: jax.Array, v: jax.Array, gates: jax.Array) -> Summary:
        """What the tokens do to a state; needs no state from outside."""

    @abstractmethod
    def replay(
        self, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, state_in: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The outputs [B, T, H, V] in v's dtype and the state that leaves."""

    def replay_keeping(
        self, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, state_in: jax.Array, **prepared: Any
    ) -> tuple[tuple[jax.Array, jax.Array], dict[str, Any]]:
        """As `replay`, when gradients will be asked for; and what they need again: `prepared` and others.

        Keywords of `replay_adjoint`. Summaries and states that it computes itself have names, "attention_summaries" and
        "attention_states": rematerialisation keeps the first, and may keep the second; what has no name it finds again.
        """
        return self.replay(q, k, v, gates, state_in, **prepared), {}

    @abstractmethod
    def summarize_adjoint(self, q: jax.Array, gates: jax.Array, dout: jax.Array) -> jax.Array:
        """The cotangent of the entering state that comes from the outputs alone, [B, H, K, V]."""

    @abstractmethod
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
        """The gradients of `replay` for cotangents of both results, and the cotangent of the entering state."""

    def replay_intra(self, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, **prepared: Any) -> Any:
        """What of the replay doesn't need the entering state, or None if all is left to `replay`."""
        del q, k, v, gates, prepared

    def replay_inter(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        intra: Any,
        **prepared: Any,
    ) -> jax.Array:
        """The outputs, given the entering state and what `replay_intra` returned."""
        raise NotImplementedError(f"{type(self).__name__} doesn't cut its replay in two")

    def replay_intra_adjoint(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        dout: jax.Array,
        **prepared: Any,
    ) -> Any:
        """What of the gradients needs no cotangent of the leaving state, or None if all is left to `replay_adjoint`."""
        del q, k, v, gates, state_in, dout, prepared

    def replay_inter_adjoint(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        gates: jax.Array,
        state_in: jax.Array,
        dout: jax.Array,
        dstate_out: jax.Array,
        intra: Any,
        **prepared: Any,
    ) -> tuple[Gradients, jax.Array]:
        """The gradients of the whole replay, given what `replay_intra_adjoint` returned."""
        del intra
        return self.replay_adjoint(q, k, v, gates, state_in, dout, dstate_out, **prepared)
