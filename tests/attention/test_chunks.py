"""The cut into chunks must not show in the result."""

import jax
import numpy as np
import pytest

import zeco_jax
from tests import agreement, oracle
from tests.attention import cases

CASE = cases.Case("chunks", regimes=cases.EVERY_REGIME, tokens=77, value_width=8, segments="odd_places")


@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("chunk_size", [1, 2, 8, 32, 256])
def test_any_chunk_size(chunk_size, decay):
    arrays = cases.arrays(cases.Case(**{**vars(CASE), "decay": decay}))

    @jax.jit
    def gradients(differentiable):
        def attend(arguments):
            return zeco_jax.linear_attention(
                **arguments, segment_ids=arrays.segment_ids, backend="xla", chunk_size=chunk_size
            )

        results, pullback = jax.vjp(attend, differentiable)
        return results, pullback((arrays.dout, arrays.dfinal))[0]

    (out, final_state), got = gradients(arrays.differentiable)
    want = oracle.recurrence(
        **arrays.differentiable, segment_ids=arrays.segment_ids, dout=arrays.dout, dfinal=arrays.dfinal
    )
    agreement.assert_agrees("out", out, want.out)
    agreement.assert_agrees("final_state", final_state, want.final_state)
    for name, gradient in got.items():
        agreement.assert_agrees(f"d{name}", gradient, want.gradients[name])


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_nan_in_a_gate_is_not_hidden(backend):
    arrays = cases.arrays(cases.Case("nan", regimes=("gla", "gla"), tokens=20)).differentiable
    poisoned = {**arrays, "log_decay": arrays["log_decay"].at[0, 10, 0].set(np.nan)}
    out, final_state = jax.jit(lambda arguments: zeco_jax.linear_attention(**arguments, backend=backend))(poisoned)
    assert np.isnan(out[0, 10:, 0]).all()
    assert np.isnan(final_state[0, 0]).all()
    assert np.isfinite(out[1]).all()
    assert np.isfinite(out[0, :, 1]).all()


@pytest.mark.parametrize("kind", ["head", "token", "channel"])
def test_gates_of_one_value_agree_whatever_their_shape(kind):
    q, k, v = (np.random.default_rng(i).normal(size=(1, 40, 2, 8)).astype(np.float32) for i in range(3))
    gate = np.array([-0.1, -0.01], np.float32)
    shape = {"head": (2,), "token": (1, 40, 2), "channel": (1, 40, 2, 8)}[kind]
    spread = np.broadcast_to(gate[:, None] if kind == "channel" else gate, shape)
    out, final_state = jax.jit(zeco_jax.linear_attention)(q, k, v, spread)
    want = oracle.recurrence(q, k, v, gate)
    agreement.assert_agrees("out", out, want.out)
    agreement.assert_agrees("final_state", final_state, want.final_state)
