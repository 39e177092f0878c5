"""Blocks of tokens: how long they may be, and how a sequence is cut into them."""

import jax.numpy as jnp
import numpy as np
import pytest

from zeco_jax.layers import cut_tokens, mini_sequence_tokens


@pytest.mark.parametrize(
    ("target_bytes", "tokens"), [(4 * 10 * 127, 127), (4 * 10 * 300, 256), (1, 1)], ids=["few", "tiles", "too-little"]
)
def test_mini_sequences_fit_their_target(target_bytes, tokens):
    assert mini_sequence_tokens(10, 4, target_bytes) == tokens


def test_an_impossible_target_is_named():
    with pytest.raises(ValueError, match="target_bytes must be at least 1, got 0"):
        mini_sequence_tokens(10, 4, 0)


@pytest.mark.parametrize(("block_tokens", "shape"), [(1, (7, 1)), (3, (3, 3)), (5, (2, 4)), (7, (1, 7)), (9, (1, 7))])
def test_blocks_are_equal_and_filled_up_with_zeros(block_tokens, shape):
    x = np.arange(1.0, 15).reshape(7, 2)
    blocks = np.asarray(cut_tokens(jnp.asarray(x), block_tokens))
    assert blocks.shape == (*shape, 2)
    flat = blocks.reshape(-1, 2)
    np.testing.assert_array_equal(flat[:7], x)
    np.testing.assert_array_equal(flat[7:], 0)


@pytest.mark.parametrize(
    ("tokens", "block_tokens", "shape"),
    [(8192, 3968, (3, 2736)), (1000, 512, (2, 512)), (640, 300, (3, 224)), (500, 512, (1, 500))],
    ids=["three", "nearly-divides", "below-the-limit", "one-block"],
)
def test_lengths_suit_matrix_products(tokens, block_tokens, shape):
    assert cut_tokens(jnp.zeros(tokens), block_tokens).shape == shape


@pytest.mark.parametrize(("tokens", "block_tokens", "named"), [(7, 0, "block_tokens"), (0, 4, "x")])
def test_what_cannot_be_cut_is_named(tokens, block_tokens, named):
    with pytest.raises(ValueError, match=rf"\b{named} must"):
        cut_tokens(jnp.zeros((tokens, 2)), block_tokens)
