"""The feed-forward layer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.agreement import assert_agrees
from zeco_jax.layers import SwiGLU

X = jax.random.normal(jax.random.key(0), (2, 5, 8))


def test_follows_the_formula():
    layer = SwiGLU(8, 12, rngs=nnx.Rngs(0))
    x = np.asarray(X, np.float64)
    gate, up = x @ layer.gate.kernel[...], x @ layer.up.kernel[...]
    assert_agrees("y", layer(X), (gate / (1 + np.exp(-gate)) * up) @ layer.down.kernel[...])


def test_computes_in_bfloat16_with_float32_parameters():
    layer = SwiGLU(8, 12, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
    assert layer(X).dtype == jnp.bfloat16
