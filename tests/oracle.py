"""What the package is measured against: the token recurrence in NumPy float64, with an adjoint written by hand.

It follows the definition and nothing else, so that it shares no idea with the code under test:

    S_t = exp(g_t) . S_{t-1} + k_t v_t^T        o_t = scale q_t S_t

with exp(g_t) = 0 at the first token of every packed document but the first of the row.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Result:
    """Values of the recurrence and, by argument name, the gradients of `sum(out dout) + sum(final_state dfinal)`."""

    out: np.ndarray
    final_state: np.ndarray
    gradients: dict[str, np.ndarray]


def token_decay(log_decay, shape, segment_ids=None) -> np.ndarray:
    """The factor [B, T, H, K] that meets the old state at each token, resets of packed documents included."""
    batch, tokens = shape[:2]
    if log_decay is None:
        decay = np.ones(shape)
    else:
        log_decay = np.asarray(log_decay, np.float64)
        expanded = {
            1: lambda g: g[None, None, :, None],
            3: lambda g: g[..., None],
            4: lambda g: g,
        }[log_decay.ndim](log_decay)
        decay = np.broadcast_to(np.exp(expanded), shape).copy()
    if segment_ids is not None:
        ids = np.asarray(segment_ids)
        first = np.zeros((batch, tokens), bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        decay[first] = 0.0
    return decay


def recurrence(
    q, k, v, log_decay=None, *, scale=None, initial_state=None, segment_ids=None, dout=None, dfinal=None
) -> Result:
    """Run the recurrence and its adjoint; `dout` and `dfinal` are the cotangents (None: zero)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, tokens, heads, key_width = k.shape
    value_width = v.shape[-1]
    scale = key_width**-0.5 if scale is None else scale
    decay = token_decay(log_decay, k.shape, segment_ids)

    states = np.zeros((tokens + 1, batch, heads, key_width, value_width))
    if initial_state is not None:
        states[0] = initial_state
    out = np.zeros((batch, tokens, heads, value_width))
    for t in range(tokens):
        states[t + 1] = decay[:, t, ..., None] * states[t] + k[:, t, ..., None] * v[:, t, :, None, :]
        out[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], states[t + 1])

    dout = np.zeros_like(out) if dout is None else np.asarray(dout, np.float64)
    dstate = np.zeros_like(states[0]) if dfinal is None else np.array(dfinal, np.float64)
    dq, dk, dv, dlog = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros_like(k)
    for t in reversed(range(tokens)):
        dstate = dstate + scale * q[:, t, ..., None] * dout[:, t, :, None, :]
        dq[:, t] = scale * np.einsum("bhkv,bhv->bhk", states[t + 1], dout[:, t])
        dk[:, t] = np.einsum("bhkv,bhv->bhk", dstate, v[:, t])
        dv[:, t] = np.einsum("bhkv,bhk->bhv", dstate, k[:, t])
        # d exp(g) = exp(g) dg, hence zero at a decay of zero.
        dlog[:, t] = decay[:, t] * (states[t] * dstate).sum(-1)
        dstate = decay[:, t, ..., None] * dstate

    gradients = {"q": dq, "k": dk, "v": dv}
    if log_decay is not None:
        summed = {1: (0, 1, 3), 3: (3,), 4: ()}[np.ndim(log_decay)]
        gradients["log_decay"] = dlog.sum(summed)
    if initial_state is not None:
        gradients["initial_state"] = dstate
    return Result(out, states[-1], gradients)


def all_scan(state, decay, *, initial_state=None, reverse=False, dstate_in=None) -> Result:
    """Exclusive scan over the leading axis (the ranks), and its adjoint; `final_state` is the state after the last.

    Args:
        state: [P, ..., K, V].
        decay: [P, ..., K] or [P, ...], linear.
        initial_state: [..., K, V] entering the first rank (the last one with `reverse`).
        reverse: From the last rank to the first.
        dstate_in: [P, ..., K, V], the cotangent of `out`.
    """
    state = np.asarray(state, np.float64)
    decay = np.asarray(decay, np.float64)
    factor = decay[..., None] if decay.ndim == state.ndim - 1 else decay[..., None, None]
    ranks = range(len(state))[:: -1 if reverse else 1]

    entering = np.zeros_like(state)
    moving = np.zeros_like(state[0]) if initial_state is None else np.asarray(initial_state, np.float64)
    for p in ranks:
        entering[p] = moving
        moving = factor[p] * moving + state[p]

    dstate, dfactor = np.zeros_like(state), np.zeros_like(state)
    dmoving = np.zeros_like(state[0])
    if dstate_in is not None:
        for p in reversed(ranks):
            dstate[p] = dmoving
            dfactor[p] = dmoving * entering[p]
            dmoving = factor[p] * dmoving + np.asarray(dstate_in[p], np.float64)
    summed = (-1,) if decay.ndim == state.ndim - 1 else (-2, -1)
    gradients = {"state": dstate, "decay": dfactor.sum(summed)}
    if initial_state is not None:
        gradients["initial_state"] = dmoving
    return Result(entering, moving, gradients)
