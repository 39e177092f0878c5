"""Tokens to vectors and back."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.agreement import assert_agrees
from tests.meshes import mesh
from zeco_jax.models.vocabulary import last_token, look_up, to_logits


def random(key, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(key), shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_and_their_gradients(dtype):
    hidden, kernel, weights = random(0, 2, 3, 8, dtype=dtype), random(1, 8, 5, dtype=dtype), random(2, 2, 3, 5)
    logits, pull_back = jax.vjp(to_logits, hidden, kernel)
    assert logits.dtype == jnp.float32
    exact = [x.astype(jnp.float32) for x in (hidden, kernel)]
    want, exact_pull_back = jax.vjp(jnp.matmul, *exact)
    assert_agrees("logits", logits, want)
    for name, got, gradient in zip(("hidden", "kernel"), pull_back(weights), exact_pull_back(weights), strict=True):
        assert got.dtype == dtype
        assert_agrees(name, got, gradient, dtype)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_tokens_stay_sharded(axis_type):
    place = NamedSharding(mesh(axis_type, data=2, seq=4), PartitionSpec("data", "seq"))
    embedding = nnx.Embed(7, 3, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 7)
    vectors = jax.jit(lambda tokens: look_up(embedding, tokens))(jax.device_put(tokens, place))
    assert_agrees("vectors", vectors, embedding.embedding[...][tokens])
    assert tuple(vectors.sharding.spec[:2]) == ("data", "seq")
    assert_agrees("last token", jax.jit(last_token)(vectors), embedding(tokens[:, -1]))
