"""What the compiler sets aside: linear in T, and never a state per token."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import zeco_jax

WIDTH = 64
DECAYS = {"head": lambda t: (1,), "token": lambda t: (1, t, 1), "channel": lambda t: (1, t, 1, WIDTH)}


def compiled_gradient(tokens: int, decay: str):
    def loss(q, k, v, log_decay, weight):
        out, _ = zeco_jax.linear_attention(q, k, v, log_decay, backend="xla")
        return jnp.sum(out * weight)

    tensor = jax.ShapeDtypeStruct((1, tokens, 1, WIDTH), jnp.float32)
    gates = jax.ShapeDtypeStruct(DECAYS[decay](tokens), jnp.float32)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(tensor, tensor, tensor, gates, tensor).compile()


def largest_buffer(text: str) -> int:
    """Elements of the largest array that the compiled program names."""
    shapes = re.findall(r"\b(?:f64|f32|bf16|f16|s32|u32|pred)\[([\d,]+)\]", text)
    return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


@pytest.mark.parametrize("decay", list(DECAYS))
def test_gradient_memory_is_linear_without_a_state_per_token(decay):
    sizes = {}
    for tokens in (4096, 16384):
        compiled = compiled_gradient(tokens, decay)
        sizes[tokens] = compiled.memory_analysis().temp_size_in_bytes
        elements = tokens * WIDTH
        assert largest_buffer(compiled.as_text()) <= 2 * elements
        # All of it together: twenty tensors as large as an input, where one state per token would be as large as 64.
        assert sizes[tokens] < 20 * 4 * elements
    assert sizes[16384] < 4.3 * sizes[4096]
