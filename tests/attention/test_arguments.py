"""Every mistake gets an error that names the argument."""

from functools import partial

import jax
import numpy as np
import pytest

import zeco_jax
from tests.arguments import wrong

B, T, H, K, V = 2, 6, 3, 4, 5


def float_array(*shape):
    return np.zeros(shape, np.float32)


MISTAKES = [
    wrong("q", float_array(B, T, H)),
    wrong("q", float_array(B, T, H, K, 1)),
    wrong("q", float_array(B, T + 1, H, K), names="q|k"),
    wrong("q", float_array(B + 1, T, H, K), names="q|k"),
    wrong("q", np.zeros((B, T, H, K), np.int32)),
    wrong("q", np.zeros((B, T, H, K), np.complex64)),
    wrong("q", [[1.0, 2.0]], label="list"),
    wrong("q", None),
    wrong("k", float_array(B, T, H, K + 1)),
    wrong("k", float_array(B, T, 1, K)),
    wrong("k", float_array(T, H, K)),
    wrong("k", np.zeros((B, T, H, K), np.int8)),
    wrong("v", float_array(B, T, H)),
    wrong("v", float_array(B, T + 1, H, V)),
    wrong("v", float_array(B, T, H + 1, V)),
    wrong("v", np.zeros((B, T, H, V), bool)),
    wrong("log_decay", float_array()),
    wrong("log_decay", float_array(H + 1)),
    wrong("log_decay", float_array(1)),
    wrong("log_decay", float_array(B, T)),
    wrong("log_decay", float_array(B, T, H, V)),
    wrong("log_decay", float_array(B, T, H, 1)),
    wrong("log_decay", float_array(1, T, H)),
    wrong("log_decay", np.zeros(H, np.int32)),
    wrong("log_decay", -0.1),
    wrong("initial_state", float_array(B, H, V, K)),
    wrong("initial_state", float_array(H, K, V)),
    wrong("initial_state", float_array(1, H, K, V)),
    wrong("initial_state", np.zeros((B, H, K, V), np.int32)),
    wrong("segment_ids", np.zeros((B, T + 1), np.int32)),
    wrong("segment_ids", np.zeros(T, np.int32)),
    wrong("segment_ids", np.zeros((B, T, H), np.int32)),
    wrong("segment_ids", float_array(B, T)),
    wrong("segment_ids", [[0] * T] * B, label="list"),
    wrong("scale", "large"),
    wrong("scale", True),
    wrong("chunk_size", 0),
    wrong("chunk_size", -16),
    wrong("chunk_size", 16.0),
    wrong("chunk_size", "16"),
    wrong("chunk_size", True),
    wrong("backend", "cuda"),
    wrong("backend", 1),
    wrong("schedule", "teleport"),
    wrong("schedule", 1),
    wrong("axis_name", "seq"),
    wrong("axis_name", ("data", "seq")),
    wrong("axis_name", 1),
]

ARGUMENTS = {
    "q": float_array(B, T, H, K),
    "k": float_array(B, T, H, K),
    "v": float_array(B, T, H, V),
    "log_decay": float_array(B, T, H),
    "initial_state": float_array(B, H, K, V),
    "segment_ids": np.zeros((B, T), np.int32),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named(mistake):
    with pytest.raises((ValueError, TypeError), match=mistake.pattern) as caught:
        zeco_jax.linear_attention(**{**ARGUMENTS, mistake.argument: mistake.value})
    mistake.check(caught.value)


def test_the_right_arguments_pass():
    out, final_state = jax.jit(zeco_jax.linear_attention)(**ARGUMENTS)
    assert out.shape == (B, T, H, V)
    assert final_state.shape == (B, H, K, V)


@pytest.mark.parametrize("shape", [(0, T, H, K), (B, 0, H, K), (B, T, 0, K), (B, T, H, 0)], ids=list("BTHK"))
def test_empty_arrays_are_refused(shape):
    q = float_array(*shape)
    with pytest.raises(ValueError, match=r"\bq\b"):
        zeco_jax.linear_attention(q, q, q)


def test_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        zeco_jax.linear_attention(*list(ARGUMENTS.values())[:4], 0.5)


def test_unknown_option():
    with pytest.raises(TypeError, match="chunksize"):
        zeco_jax.linear_attention(**ARGUMENTS, chunksize=16)


def test_scale_of_zero_is_not_the_default():
    arguments = {name: np.ones_like(value) for name, value in ARGUMENTS.items()}
    assert not jax.jit(partial(zeco_jax.linear_attention, scale=0.0))(**arguments)[0].any()


def test_mistakes_are_found_under_jit():
    with pytest.raises(ValueError, match=r"\bk\b"):
        jax.jit(zeco_jax.linear_attention)(ARGUMENTS["q"], ARGUMENTS["k"][:, :3], ARGUMENTS["v"])
