"""Sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.layers.shared import make_sharding
from zeco_jax.models import LinearAttentionLM, ModelConfig, sample

CONFIG = ModelConfig(
    vocabulary_size=19, hidden_size=16, num_layers=2, num_heads=2, conv_width=3, mlp_multiple=16, tie_embeddings=True
)
PROMPT = jax.random.randint(jax.random.key(3), (2, 5), 0, CONFIG.vocabulary_size, jnp.uint8)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return LinearAttentionLM(CONFIG, rngs=nnx.Rngs(0))


def greedy_continuation(model, prompt, steps):
    """Each token from the parallel form on everything before it."""
    run = jax.jit(model)
    padded = jnp.pad(prompt, ((0, 0), (0, steps)))  # the future doesn't matter
    for t in range(prompt.shape[1], padded.shape[1]):
        padded = padded.at[:, t].set(jnp.argmax(run(padded)[:, t - 1], axis=-1).astype(prompt.dtype))
    return padded[:, prompt.shape[1] :]


def test_temperature_zero_takes_the_likeliest(model):
    tokens = sample(model, PROMPT, steps=6, key=KEY, temperature=0.0)
    assert tokens.shape == (2, 6)
    assert tokens.dtype == PROMPT.dtype
    np.testing.assert_array_equal(tokens, greedy_continuation(model, PROMPT, 6))


def test_one_likeliest_is_the_same_as_temperature_zero(model):
    want = sample(model, PROMPT, steps=6, key=KEY, temperature=0.0)
    np.testing.assert_array_equal(sample(model, PROMPT, steps=6, key=jax.random.key(9), top_k=1), want)


def test_the_key_decides(model):
    first = sample(model, PROMPT, steps=20, key=KEY)
    np.testing.assert_array_equal(sample(model, PROMPT, steps=20, key=KEY), first)
    assert not np.array_equal(sample(model, PROMPT, steps=20, key=jax.random.key(1)), first)


def test_draws_from_the_softmax(model):
    copies = 4000
    prompt = jnp.broadcast_to(PROMPT[:1], (copies, 5))
    tokens = sample(model, prompt, steps=1, key=KEY, temperature=0.25, top_k=7)
    logits = np.asarray(jax.jit(model)(PROMPT[:1])[0, -1], np.float64) / 0.25
    likeliest = np.argsort(logits)[-7:]
    want = np.zeros(CONFIG.vocabulary_size)
    want[likeliest] = np.exp(logits[likeliest]) / np.exp(logits[likeliest]).sum()
    got = np.bincount(tokens[:, 0], minlength=CONFIG.vocabulary_size) / copies
    np.testing.assert_allclose(got, want, atol=5 * 0.5 / np.sqrt(copies))
    assert set(np.flatnonzero(got)) <= set(likeliest)


def test_a_sharded_model_samples_the_same(model):
    sharded = LinearAttentionLM(CONFIG, sharding=make_sharding((2, 4)), rngs=nnx.Rngs(0))
    want = sample(model, PROMPT, steps=6, key=KEY, temperature=0.0)
    np.testing.assert_array_equal(sample(sharded, PROMPT, steps=6, key=KEY, temperature=0.0), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, "top_k must lie between 1 and the vocabulary's 19, got 0"),
        ({"top_k": 20}, "top_k must lie between 1 and the vocabulary's 19, got 20"),
        ({"prompt": PROMPT[:, :0]}, r"prompt must be \[B, T\] with at least one token, got shape \(2, 0\)"),
        ({"prompt": PROMPT[0]}, r"prompt must be \[B, T\] with at least one token, got shape \(5,\)"),
    ],
    ids=["steps", "temperature", "nan", "top-0", "top-20", "empty", "no-batch"],
)
def test_refuses(model, options, message):
    arguments = {"prompt": PROMPT, "steps": 1, "key": KEY} | options
    with pytest.raises(ValueError, match=message):
        sample(model, **arguments)
