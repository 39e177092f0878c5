"""One stretch after another is the whole: values, gradients and caches, across ranks and documents."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.agreement import assert_agrees
from tests.layers.shared import assert_trees_agree, make_sharding
from tests.models.test_language_model import TOKENS, make

# Borders inside stretches and ranks, and two where a stretch begins; documents of one token, an id that comes back.
SEGMENT_IDS = np.repeat([[0, 1, 2, 3, 2, 5], [7, 7, 7, 8, 8, 8]], [8, 6, 1, 1, 14, 10], axis=1).astype(np.int32)
STRETCHES = (slice(0, 16), slice(16, 24), slice(24, 40))


def in_stretches(model, cache, segment_ids=SEGMENT_IDS, stretches=STRETCHES):
    hidden = []
    for stretch in stretches:
        ids = None if segment_ids is None else segment_ids[:, stretch]
        part, cache = model.extend(TOKENS[:, stretch], cache, ids)
        hidden.append(part)
    return jnp.concatenate(hidden, axis=1), cache


def value_and_gradients(run, model, *arguments):
    """What `run(model, *arguments)` returns, and the gradients of a weighted sum in parameters and arguments."""
    definition, parameters = nnx.split(model)

    def weighted_sum(parameters, *arguments):
        hidden = run(nnx.merge(definition, parameters), *arguments)
        return (hidden * jax.random.normal(jax.random.key(5), hidden.shape)).sum(), hidden

    gradients, hidden = jax.jit(jax.grad(weighted_sum, range(len(arguments) + 1), has_aux=True))(parameters, *arguments)
    return hidden, gradients


@pytest.fixture(scope="module")
def whole():
    return value_and_gradients(lambda model: model.hidden(TOKENS, SEGMENT_IDS), make())


@pytest.mark.parametrize("shape", [None, (1, 8)], ids=["one-device", "1x8"])
def test_stretches_equal_the_whole(shape, whole):
    model = make(shape and make_sharding(shape), remat=True)
    got = value_and_gradients(lambda model: in_stretches(model, model.init_cache(2))[0], model)
    assert_trees_agree("stretches", got, whole)


@pytest.mark.parametrize("cuts", [(1, 2, 39), (8, 14, 15)], ids=str)
def test_stretches_of_any_length(cuts):
    edges = (0, *cuts, 40)
    stretches = [slice(*ends) for ends in itertools.pairwise(edges)]
    model = make()
    hidden, _ = jax.jit(lambda cache: in_stretches(model, cache, stretches=stretches))(model.init_cache(2))
    assert_agrees("hidden", hidden, jax.jit(model.hidden)(TOKENS, SEGMENT_IDS))


def test_the_gradient_reaches_the_cache():
    empty = make().init_cache(2)
    layers = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.ndim), x.shape), empty.layers)
    # The second row begins with another document than the cache ends in.
    segment = jnp.array([0, 6], jnp.int32)

    def run(stretches):
        return lambda model, layers: in_stretches(model, empty._replace(layers=layers, segment=segment), **stretches)[0]

    want = value_and_gradients(run({"stretches": [slice(0, 40)]}), make(), layers)
    got = value_and_gradients(run({}), make(make_sharding((1, 8))), layers)
    assert_trees_agree("stretches", got, want)
    for leaf in jax.tree.leaves(want[1][1]):
        assert np.abs(leaf[:, 0]).max() > 0
        np.testing.assert_array_equal(leaf[:, 1], 0)


def test_without_ids_the_document_goes_on():
    model = make()
    hidden, cache = in_stretches(model, model.init_cache(2), segment_ids=None)
    assert_agrees("hidden", hidden, jax.jit(model.hidden)(TOKENS))
    last, _ = model.extend(TOKENS[:, :8], cache, jnp.zeros((2, 8), jnp.uint8))
    assert_agrees("hidden", last, jax.jit(model.hidden)(jnp.concatenate([TOKENS, TOKENS[:, :8]], axis=1))[:, 40:])


@pytest.mark.parametrize(
    ("segment_ids", "message"),
    [
        (SEGMENT_IDS[:, :8], r"segment_ids must be integers of shape \(2, 40\), got int32 of shape \(2, 8\)"),
        (SEGMENT_IDS / 2, r"segment_ids must be integers of shape \(2, 40\), got float64"),
    ],
    ids=["shape", "type"],
)
def test_refuses_what_are_no_segment_ids(segment_ids, message):
    with pytest.raises(ValueError, match=message):
        make().extend(TOKENS, make().init_cache(2), segment_ids)
