"""Drawing text from a model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zeco_jax.models.language_model import LinearAttentionLM


def sample(
    model: LinearAttentionLM,
    prompt: jax.Array,
    *,
    steps: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> jax.Array:
    """Continues prompts token by token.

    Each token is drawn from `softmax(logits / temperature)`, over the `top_k` likeliest tokens only if that is given.

    Args:
        model: The language model.
        prompt: [B, T] integers, T at least 1.
        steps: How many tokens to draw, at least 1.
        key: Random key, from `jax.random.key`.
        temperature: 0 takes the likeliest token each time.
        top_k: How many of the likeliest tokens may be drawn; None: all.

    Returns:
        [B, steps] integers in the prompt's dtype, without the prompt.

    Raises:
        ValueError: An argument out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from zeco_jax.models import LinearAttentionLM, ModelConfig, sample
        >>> config = ModelConfig(vocabulary_size=11, hidden_size=16, num_layers=1, num_heads=2)
        >>> model = LinearAttentionLM(config, rngs=nnx.Rngs(0))
        >>> sample(model, jnp.array([[1, 2, 3]]), steps=4, key=jax.random.key(0), temperature=0.0).shape
        (1, 4)
    """
    vocabulary_size = model.config.vocabulary_size
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must be [B, T] with at least one token, got shape {prompt.shape}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocabulary_size:
        raise ValueError(f"top_k must lie between 1 and the vocabulary's {vocabulary_size}, got {top_k}")
    definition, state = nnx.split(model)
    greedy = temperature == 0
    return _continue(
        definition, state, prompt, key, 1.0 if greedy else temperature, steps=steps, top_k=1 if greedy else top_k
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames=("steps", "top_k"))
def _continue(
    definition: Any,
    state: Any,
    prompt: jax.Array,
    key: jax.Array,
    temperature: jax.Array | float,
    *,
    steps: int,
    top_k: int | None,
) -> jax.Array:
    model = nnx.merge(definition, state)

    def draw(logits: jax.Array, key: jax.Array) -> jax.Array:
        if top_k == 1:
            return jnp.argmax(logits, axis=-1).astype(prompt.dtype)
        if top_k is not None:
            least = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits / temperature).astype(prompt.dtype)

    def step(carry: tuple[jax.Array, Any], key: jax.Array) -> tuple[tuple[jax.Array, Any], jax.Array]:
        token, cache = carry
        logits, cache = model.decode_step(token, cache)
        token = draw(logits, key)
        return (token, cache), token

    first_key, *keys = jax.random.split(key, steps) if steps > 1 else (key,)
    logits, cache = model.prefill(prompt, model.init_cache(prompt.shape[0], prompt.shape[1] + steps))
    first = draw(logits, first_key)
    if not keys:
        return first[:, None]
    _, rest = jax.lax.scan(step, (first, cache), jnp.stack(keys))
    return jnp.concatenate([first[:, None], rest.T], axis=1)
