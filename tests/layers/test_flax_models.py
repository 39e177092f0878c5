"""The layer in somebody's own Flax model, NNX and Linen."""

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

from tests.agreement import assert_agrees
from tests.layers.shared import make_sharding
from zeco_jax.layers import GatedLinearAttention

X = jax.random.normal(jax.random.key(0), (2, 16, 8))
TARGETS = jnp.roll(X[..., 0] > 0, 1, axis=1).astype(jnp.int32)


class Tagger(nnx.Module):
    """A user's NNX model: one class per token."""

    def __init__(self, sharding=None, *, rngs):
        self.attention = GatedLinearAttention(8, num_heads=2, conv_width=2, sharding=sharding, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(x + self.attention(x))


class LinenTagger(linen.Module):
    """The same as a Linen model, the layer through Flax's bridge."""

    @linen.compact
    def __call__(self, x):
        attention = nnx.bridge.ToLinen(GatedLinearAttention, args=(8, 2), kwargs={"conv_width": 2}, name="attention")
        return linen.Dense(2, name="head")(x + attention(x))


def loss(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS).mean()


def test_trains_in_an_nnx_model():
    def losses(sharding):
        model = Tagger(sharding, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            value, gradients = nnx.value_and_grad(lambda model: loss(model(X)))(model)
            optimizer.update(model, gradients)
            return value

        return [float(step(model, optimizer)) for _ in range(20)]

    alone, sharded = losses(None), losses(make_sharding((2, 4)))
    assert alone[-1] < 0.7 * alone[0]
    assert_agrees("losses", sharded[:5], alone[:5])


def test_trains_in_a_linen_model():
    model, optimizer = LinenTagger(), optax.adam(3e-2)
    variables = model.init(jax.random.key(0), X)
    state = optimizer.init(variables)

    @jax.jit
    def step(variables, state):
        value, gradients = jax.value_and_grad(lambda variables: loss(model.apply(variables, X)))(variables)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(variables, updates), state, value

    values = []
    for _ in range(20):
        variables, state, value = step(variables, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]


def test_linen_and_nnx_agree_on_the_same_parameters():
    layer = GatedLinearAttention(8, 2, conv_width=2, rngs=nnx.Rngs(0))
    bridged = nnx.bridge.ToLinen(GatedLinearAttention, args=(8, 2), kwargs={"conv_width": 2})
    bridged.init(jax.random.key(0), X)
    parameters = nnx.to_pure_dict(nnx.state(layer))
    assert_agrees("y", bridged.apply({"params": parameters}, X), layer(X))
