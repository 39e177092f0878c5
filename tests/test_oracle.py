"""The oracle itself: its adjoint against central differences, its values against the recurrence written out."""

import numpy as np
import pytest

from tests import oracle


def slope(function, value, direction, step=1e-6):
    return (function(value + step * direction) - function(value - step * direction)) / (2 * step)


@pytest.mark.parametrize("decay_shape", [None, (2,), (2, 6, 2), (2, 6, 2, 3)], ids=["none", "head", "token", "channel"])
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
def test_recurrence_adjoint_agrees_with_central_differences(decay_shape, packed):
    rng = np.random.default_rng(0)
    arguments = {
        "q": rng.normal(size=(2, 6, 2, 3)),
        "k": rng.normal(size=(2, 6, 2, 3)),
        "v": rng.normal(size=(2, 6, 2, 4)),
        "initial_state": rng.normal(size=(2, 2, 3, 4)),
    }
    if decay_shape is not None:
        arguments["log_decay"] = -rng.exponential(size=decay_shape)
    fixed = {"segment_ids": np.array([[1, 1, 2, 2, 1, 3], [5, 5, 5, 5, 5, 5]]) if packed else None, "scale": 0.3}
    dout, dfinal = rng.normal(size=(2, 6, 2, 4)), rng.normal(size=(2, 2, 3, 4))
    gradients = oracle.recurrence(**arguments, **fixed, dout=dout, dfinal=dfinal).gradients

    assert gradients.keys() == arguments.keys()
    for name, value in arguments.items():

        def loss(x, name=name):
            result = oracle.recurrence(**{**arguments, name: x}, **fixed)
            return (result.out * dout).sum() + (result.final_state * dfinal).sum()

        direction = rng.normal(size=value.shape)
        np.testing.assert_allclose((gradients[name] * direction).sum(), slope(loss, value, direction), rtol=1e-7)


def test_recurrence_by_hand():
    q = k = v = np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    initial_state = np.full((1, 1, 1, 1), 10.0)

    def run(log_decay, segment_ids=None):
        result = oracle.recurrence(q, k, v, log_decay, scale=1.0, initial_state=initial_state, segment_ids=segment_ids)
        return result.out.ravel().tolist(), result.final_state.item()

    half = np.log([0.5])
    assert run(half) == ([6.0, 14.0, 37.5], 12.5)
    assert run(half, [[7, 8, 8]]) == ([6.0, 8.0, 33.0], 11.0)
    assert run(None) == ([11.0, 30.0, 72.0], 24.0)
    with np.errstate(divide="ignore"):
        assert run(np.log([0.0])) == ([1.0, 8.0, 27.0], 9.0)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("decay_shape", [(4, 2, 3), (4, 2)], ids=["channel", "head"])
def test_all_scan_adjoint_agrees_with_central_differences(decay_shape, reverse):
    rng = np.random.default_rng(1)
    arguments = {
        "state": rng.normal(size=(4, 2, 3, 5)),
        "decay": rng.uniform(size=decay_shape),
        "initial_state": rng.normal(size=(2, 3, 5)),
    }
    dstate_in = rng.normal(size=(4, 2, 3, 5))
    gradients = oracle.all_scan(**arguments, reverse=reverse, dstate_in=dstate_in).gradients
    for name, value in arguments.items():

        def loss(x, name=name):
            return (oracle.all_scan(**{**arguments, name: x}, reverse=reverse).out * dstate_in).sum()

        direction = rng.normal(size=value.shape)
        np.testing.assert_allclose((gradients[name] * direction).sum(), slope(loss, value, direction), rtol=1e-7)
