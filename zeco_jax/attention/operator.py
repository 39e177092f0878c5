"""Linear attention as one differentiable operator: a backend for the local work, an exchange for what lies outside."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zeco_jax.attention.backend import Backend, Gradients, Summary, checkpointed
from zeco_jax.attention.gates import accumulation_dtype, normalize_gates
from zeco_jax.varying import match_varying


class Exchange(Protocol):
    """Delivers to each rank the state that enters it, and backwards the cotangent of the state that leaves it.

    An exchange is static: hashable, and equal when it does the same.

    Attributes:
        takes_turns: whether ranks work one after the other, through `take_turns`, instead of all at once around
            `forward` and `reverse`.
    """

    takes_turns: bool

    def forward(self, summary: Summary, initial_state: jax.Array) -> jax.Array:
        """The state that enters this rank [B, H, K, V]; `initial_state` enters the first one."""

    def reverse(self, summary: Summary) -> jax.Array:
        """The cotangent of the state that leaves this rank [B, H, K, V].

        `summary.decay` is the rank's decay as in `forward`, `summary.state` the cotangent that its own results put on
        the state that enters it; what the ranks after this one put on it is the result.
        """

    def take_turns[Results](
        self, work: Callable[[jax.Array], tuple[Results, jax.Array]], first: jax.Array, *, reverse: bool
    ) -> tuple[Results, jax.Array]:
        """Runs `entering state -> (results, leaving state)` rank by rank; returns the results and what entered."""

    def into_initial(self, dstate_in: jax.Array) -> jax.Array:
        """This rank's share of the initial state's cotangent: `dstate_in` on the first rank, zero elsewhere."""


class Residuals(NamedTuple):
    """What the backward pass keeps: the inputs, one state, the rank's decay and what the backend prepared.

    `decay` is None where no exchange asks for it.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gates: jax.Array
    state_in: jax.Array
    decay: jax.Array | None
    prepared: dict[str, Any]


# Compiled as a whole also where the caller works without jit, in a notebook say.
@partial(jax.jit, static_argnames=("backend", "exchange"))
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    *,
    backend: Backend,
    exchange: Exchange | None = None,
    initial_state: jax.Array | None = None,
    starts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention of this device's tokens, on inputs that have been checked.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        log_decay: None, [H], [B, T, H] or [B, T, H, K].
        backend: computes the local parts.
        exchange: brings the entering state from the other ranks; None where there are none.
        initial_state: [B, H, K, V], the state before the first rank's tokens; None stands for zero.
        starts: [B, T] booleans, tokens that begin a document.

    Returns:
        The outputs [B, T, H, V] in v's dtype and the state that leaves *this* device's tokens, [B, H, K, V].
    """
    out_dtype = v.dtype
    common = jnp.result_type(q, k, v)
    q, k, v = q.astype(common), k.astype(common), v.astype(common)
    dtype = accumulation_dtype(common)
    if log_decay is None:
        log_decay = jnp.zeros(q.shape[2], dtype)
    if initial_state is None:
        # Laid out over an explicit mesh as k and v are.
        initial_state = jnp.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :], dtype)
    # One set of varying axes for the gradient rule; what was replicated gets its cotangents summed by this cast, which
    # so comes before a decay per head is spread over the tokens.
    q, k, v, log_decay, initial_state = match_varying([q, k, v, log_decay, initial_state.astype(dtype)])
    gates = normalize_gates(log_decay, starts, q.shape, dtype, finite=not backend.takes_infinite_gates)
    out, state_out = _attend(q, k, v, gates, initial_state, backend, exchange)
    return out.astype(out_dtype), state_out


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    initial_state: jax.Array,
    backend: Backend,
    exchange: Exchange | None,
) -> tuple[jax.Array, jax.Array]:
    return _forward(q, k, v, gates, initial_state, backend, exchange, keep=False)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    initial_state: jax.Array,
    backend: Backend,
    exchange: Exchange | None,
    *,
    keep: bool = True,
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
    def replay(state: jax.Array, **prepared: Any) -> tuple[tuple[jax.Array, jax.Array], dict[str, Any]]:
        if keep:
            return backend.replay_keeping(q, k, v, gates, state, **prepared)
        return backend.replay(q, k, v, gates, state, **prepared), {}

    if exchange is None:
        (out, state_out), kept = replay(initial_state)
        return (_kept(out), state_out), Residuals(q, k, v, gates, initial_state, None, kept)
    # What has a name can be kept by rematerialisation, which then neither attends nor exchanges again.
    prepared = _named("prepared", checkpointed("attention_summaries", backend.prepare(k, v, gates)))
    if exchange.takes_turns:

        def work(state: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            results = backend.replay(q, k, v, gates, state, **prepared)
            return results, results[1]

        results, state_in = exchange.take_turns(work, initial_state, reverse=False)
        return results, Residuals(q, k, v, gates, state_in, None, prepared)
    summary = backend.summarize(k, v, gates, **prepared)
    state_in = checkpoint_name(exchange.forward(summary, initial_state), "entering_state")
    # Independent of the exchange, so that it can run while the state travels.
    arrived, intra = _together(state_in, backend.replay_intra(q, k, v, gates, **prepared))
    if intra is None:
        (out, _), kept = replay(arrived, **prepared)
    else:
        out, kept = backend.replay_inter(q, k, v, gates, arrived, intra, **prepared), {}
    residuals = Residuals(q, k, v, gates, state_in, summary.decay, prepared | kept)
    return (_kept(out), summary.leave(state_in)), residuals


def _backward(
    backend: Backend, exchange: Exchange | None, residuals: Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, ...]:
    q, k, v, gates, state_in, decay, prepared = residuals
    dout, dstate_out = cotangents
    if exchange is None:
        gradients, dstate_in = backend.replay_adjoint(q, k, v, gates, state_in, dout, dstate_out, **prepared)
        return *gradients, dstate_in
    adjoint = _named("prepared_adjoint", backend.prepare_adjoint(q, gates, dout))
    prepared = prepared | adjoint
    if exchange.takes_turns:

        def work(dstate_later: jax.Array) -> tuple[tuple[Gradients, jax.Array], jax.Array]:
            dstate = dstate_out + dstate_later
            results = backend.replay_adjoint(q, k, v, gates, state_in, dout, dstate, **prepared)
            return results, results[1]

        (gradients, dstate_in), _ = exchange.take_turns(work, jnp.zeros_like(dstate_out), reverse=True)
        return *gradients, exchange.into_initial(dstate_in)
    own = Summary(decay, backend.summarize_adjoint(q, gates, dout, **adjoint))
    later = exchange.reverse(Summary(decay, own.leave(dstate_out)))
    later, intra = _together(later, backend.replay_intra_adjoint(q, k, v, gates, state_in, dout, **prepared))
    gradients, dstate_in = backend.replay_inter_adjoint(
        q, k, v, gates, state_in, dout, dstate_out + later, intra, **prepared
    )
    return *gradients, exchange.into_initial(dstate_in)


def _kept(out: jax.Array) -> jax.Array:
    """Outputs under the name by which rematerialisation keeps them.

    With all heads' features last, as a TPU kernel writes them: kept by heads they would be laid out anew, and again in
    the backward pass.
    """
    return checkpoint_name(out.reshape(*out.shape[:2], -1), "attention_out").reshape(out.shape)


def _named(name: str, prepared: Any) -> dict[str, Any]:
    """What a backend has prepared, as an argument for its other parts."""
    return {} if prepared is None else {name: prepared}


def _together[Work](arrived: jax.Array, work: Work) -> tuple[jax.Array, Work]:
    """Nobody uses what arrived before the independent work is done, so that the compiler does it on the way.

    Left to itself, the TPU compiler has put it after the arrival of the states, for which nothing then runs.
    """
    return (arrived, work) if work is None else jax.lax.optimization_barrier((arrived, work))


_attend.defvjp(_forward, _backward)
