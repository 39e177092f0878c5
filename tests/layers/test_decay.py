"""The kinds of decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.agreement import assert_agrees
from zeco_jax.layers import DecayGate, retention_log_decay

X = jax.random.normal(jax.random.key(0), (2, 5, 8))


def make(**options):
    return DecayGate(8, num_heads=2, key_width=3, rngs=nnx.Rngs(0), **options)


def log_sigmoid(x):
    return -np.log1p(np.exp(-np.asarray(x, np.float64)))


def test_channel_gate_follows_the_formula():
    gate = make(rank=4, normalizer=8.0, kernel_init=nnx.initializers.normal(1.0))
    assert gate.down.kernel.shape == (8, 4)
    logits = np.asarray(X, np.float64) @ gate.down.kernel[...] @ gate.up.kernel[...] + gate.up.bias[...]
    assert_agrees("log_decay", gate(X), log_sigmoid(logits).reshape(2, 5, 2, 3) / 8)


def test_token_gate_follows_the_formula():
    gate = make(kind="token", kernel_init=nnx.initializers.normal(1.0))
    logits = np.asarray(X, np.float64) @ gate.up.kernel[...] + gate.up.bias[...]
    assert_agrees("log_decay", gate(X), log_sigmoid(logits) / 16)


def test_fixed_decays_are_those_of_retention():
    gate = make(kind="head")
    assert not jax.tree.leaves(nnx.state(gate))
    assert_agrees("log_decay", jnp.exp(gate(X)), [1 - 1 / 32, 1 - 1 / 64])
    assert_agrees("log_decay", jnp.exp(retention_log_decay(3))[2], 1 - 1 / 128)


def test_none_has_neither_decay_nor_parameters():
    gate = make(kind="none")
    assert gate(X) is None
    assert not jax.tree.leaves(nnx.state(gate))


@pytest.mark.parametrize("kind", ["channel", "token", "head"])
def test_gates_are_float32_in_a_bfloat16_model(kind):
    log_decay = make(kind=kind, dtype=jnp.bfloat16)(X.astype(jnp.bfloat16))
    assert log_decay.dtype == jnp.float32
    assert (log_decay <= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "layer"}, "channel, token, head, none; got 'layer'"),
        ({"rank": 0}, "gate_rank must be at least 1, got 0"),
        ({"normalizer": 0.0}, "gate_normalizer must be positive, got 0.0"),
    ],
    ids=["kind", "rank", "normalizer"],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
