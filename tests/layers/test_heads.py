"""Features and heads."""

import jax.numpy as jnp
import pytest

from zeco_jax.layers.heads import head_width, split_heads


@pytest.mark.parametrize(("features", "expand", "heads", "width"), [(16, 0.5, 4, 2), (10, 0.7, 7, 1), (6, 2.0, 3, 4)])
def test_width(features, expand, heads, width):
    assert head_width(features, expand, heads, "expand_k") == width


@pytest.mark.parametrize(("features", "expand", "heads"), [(16, 0.5, 3), (4, 0.25, 2), (16, 0.3, 1)])
def test_refuses_what_heads_do_not_divide(features, expand, heads):
    with pytest.raises(ValueError, match=rf"expand_v .* got {expand} \* {features} and {heads}"):
        head_width(features, expand, heads, "expand_v")


def test_features_of_a_head_are_neighbours():
    assert split_heads(jnp.arange(6), 2).tolist() == [[0, 1, 2], [3, 4, 5]]
