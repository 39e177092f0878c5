"""The softmax attention layer: its formula, and that all ways to run it agree."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from tests.agreement import assert_agrees
from tests.layers.shared import SEGMENT_IDS, assert_trees_agree, make_sharding, meshes, on_mesh, value_and_gradients
from tests.meshes import mesh
from zeco_jax.layers import SoftmaxAttention

FEATURES, HEADS = 32, 8
WHOLE, TOKENS = PartitionSpec(), PartitionSpec(None, "seq")


def make(**options):
    # Larger weights than usual, so that scores are far from equal.
    options = {"kernel_init": nnx.initializers.normal(0.5), "num_heads": HEADS, "num_kv_heads": 2} | options
    return SoftmaxAttention(FEATURES, **options, rngs=nnx.Rngs(0))


def inputs(tokens=40):
    return jax.random.normal(jax.random.key(1), (2, tokens, FEATURES))


def formula(layer, x, segment_ids=None):
    """The layer in NumPy float64."""
    x = np.asarray(x, np.float64)
    tokens, heads, groups, width = x.shape[1], layer.num_heads, layer.num_kv_heads, layer.head_width
    qkv = (x @ layer.qkv.kernel[...]).reshape(*x.shape[:2], heads + 2 * groups, width)
    q, k, v = np.split(qkv, [heads, heads + groups], axis=2)
    angles = np.arange(tokens)[:, None, None] * layer.rotary_base ** (-np.arange(width // 2) * 2 / width)
    q, k = (
        np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1)
        for a, b in (np.split(array, 2, axis=-1) for array in (q, k))
    )
    k, v = k.repeat(heads // groups, axis=2), v.repeat(heads // groups, axis=2)
    seen = np.tril(np.ones((tokens, tokens), bool))[None, None]
    if segment_ids is not None:
        documents = np.cumsum(np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0, axis=1)
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    scores = np.where(seen, np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(width), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshk->bthk", weights, v).reshape(*x.shape[:2], -1) @ layer.output.kernel[...]


@pytest.mark.parametrize("segment_ids", [None, SEGMENT_IDS], ids=["one-document", "packed"])
def test_follows_the_formula(segment_ids):
    layer = make()
    assert_agrees("y", jax.jit(layer)(inputs(), segment_ids), formula(layer, inputs(), segment_ids))


@pytest.fixture(scope="module")
def one_device():
    """Values and gradients on one device."""
    return value_and_gradients(make(), inputs(), SEGMENT_IDS)


@meshes
def test_sharded_equals_one_device(shape, axis_type, one_device):
    layer = on_mesh(make(sharding=make_sharding(shape, axis_type)))
    assert_trees_agree("sharded", value_and_gradients(layer, inputs(), SEGMENT_IDS), one_device)


@pytest.mark.parametrize("strategy", ["ring-plain", "ulysses"])
def test_every_strategy_equals_one_device(strategy, one_device):
    layer = make(strategy=strategy, sharding=make_sharding((1, 8)))
    assert_trees_agree(strategy, value_and_gradients(layer, inputs(), SEGMENT_IDS), one_device)


def test_inside_a_shard_map_of_the_user(one_device):
    definition, parameters = nnx.split(make(axis_name="seq"))

    @functools.partial(jax.shard_map, mesh=mesh(seq=8), in_specs=(WHOLE, TOKENS, TOKENS), out_specs=TOKENS)
    def run(parameters, x, segment_ids):
        return nnx.merge(definition, parameters)(x, segment_ids)

    assert_agrees("y", jax.jit(run)(parameters, inputs(), SEGMENT_IDS), one_device[0])


def in_stretches(layer, x, segment_ids, edges, cache):
    """The layer stretch by stretch, where none begins a document."""
    outs = []
    for start, end in itertools.pairwise(edges):
        out, cache = layer.prefill(x[:, start:end], cache, segment_ids[:, start:end])
        outs.append(out)
    return jnp.concatenate(outs, axis=1), cache


# Not where a document begins in either row of SEGMENT_IDS; the first cache stays larger than what it holds.
EDGES, CAPACITY = (0, 8, 16, 40), 43


class InStretches(nnx.Module):
    """A layer whose call goes stretch by stretch."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x, segment_ids):
        return in_stretches(self.layer, x, segment_ids, EDGES, self.layer.init_cache(2, CAPACITY))[0]


@pytest.mark.parametrize(
    ("shape", "axis_type"),
    [(None, None), ((1, 8), AxisType.Auto), ((2, 4), AxisType.Explicit)],
    ids=["one-device", "1x8-auto", "2x4-explicit"],
)
def test_stretches_equal_the_whole(shape, axis_type, one_device):
    layer = make() if shape is None else on_mesh(make(sharding=make_sharding(shape, axis_type)))
    out, gradients = value_and_gradients(InStretches(layer), inputs(), SEGMENT_IDS)
    assert_trees_agree("stretches", (out, (gradients[0]["layer"], gradients[1])), one_device)


def test_stretches_inside_a_shard_map_of_the_user(one_device):
    definition, parameters = nnx.split(make(axis_name="seq"))

    @functools.partial(
        jax.shard_map, mesh=mesh(seq=4), in_specs=(WHOLE, TOKENS, TOKENS, WHOLE), out_specs=(TOKENS, WHOLE)
    )
    def prefill(parameters, x, segment_ids, cache):
        return nnx.merge(definition, parameters).prefill(x, cache, segment_ids)

    prefill = jax.jit(prefill)
    first, cache = prefill(parameters, inputs()[:, :16], SEGMENT_IDS[:, :16], make().init_cache(2, CAPACITY))
    second, _ = prefill(parameters, inputs()[:, 16:], SEGMENT_IDS[:, 16:], cache)
    assert_agrees("y", jnp.concatenate([first, second], axis=1), one_device[0])


def test_a_stretch_may_begin_a_document():
    layer, x = make(), inputs()
    _, cache = layer.prefill(x[:, :8], layer.init_cache(2, CAPACITY))
    out, cache = layer.prefill(x[:, 8:12], cache, continues=jnp.array([True, False]))
    last, _ = layer.decode_step(x[:, 12], cache)
    out = jnp.concatenate([out, last[:, None]], axis=1)
    want = jax.jit(layer)(x[:, :13], jnp.repeat(jnp.array([[0, 0], [0, 1]]), np.array([8, 5]), axis=1))
    assert_agrees("y", out, want[:, 8:])


@pytest.mark.parametrize(
    ("shape", "axis_type"),
    [(None, None), ((2, 4), AxisType.Auto), ((2, 4), AxisType.Explicit)],
    ids=["one-device", "2x4-auto", "2x4-explicit"],
)
def test_decode_equals_the_parallel_form(shape, axis_type):
    x = inputs(tokens=12)
    layer = make() if shape is None else on_mesh(make(sharding=make_sharding(shape, axis_type)))
    out, cache = jax.jit(layer.prefill)(x[:, :8], layer.init_cache(2, 12))
    outs, step = list(np.asarray(out).swapaxes(0, 1)), jax.jit(layer.decode_step)
    for t in range(8, 12):
        out, cache = step(x[:, t], cache)
        outs.append(np.asarray(out))
    assert_agrees("y", np.stack(outs, axis=1), formula(make(), x))


def test_a_full_cache_is_refused_or_gives_no_number():
    layer, x = make(), inputs(tokens=4)
    cache = layer.init_cache(2, 6)
    with pytest.raises(ValueError, match="has places for 6 tokens: it holds 0, and 40 more don't fit"):
        jax.eval_shape(layer.prefill, inputs(), cache)
    _, cache = layer.prefill(x, cache)
    with pytest.raises(ValueError, match="has places for 6 tokens: it holds 4, and 4 more don't fit"):
        layer.prefill(x, cache)
    out, cache = jax.jit(layer.prefill)(x, cache)
    assert np.isnan(out).all()
    with pytest.raises(ValueError, match="it holds 8, and 1 more don't fit"):
        layer.decode_step(x[:, 0], cache)


def test_bfloat16_stays_close():
    layer = make(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
    out, cache = jax.jit(layer.prefill)(inputs().astype(jnp.bfloat16), layer.init_cache(2, 40))
    assert (out.dtype, cache.keys.dtype) == (jnp.bfloat16, jnp.bfloat16)
    want = formula(make(), inputs())
    assert np.sqrt(np.mean((out - want) ** 2) / np.mean(want**2)) < 3e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 3}, "must be a positive multiple of num_heads, got .* 32 and 3"),
        ({"num_heads": 32}, "num_heads must leave each head an even number of features, got 32 / 32"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 8"),
        ({"sharding": True, "axis_name": "seq"}, "not both"),
    ],
    ids=["heads", "odd-heads", "no-heads", "kv-heads", "two-ways"],
)
def test_refuses(options, message):
    if "sharding" in options:
        options = options | {"sharding": make_sharding((1, 1))}
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_refuses_wrong_inputs():
    layer = make()
    with pytest.raises(ValueError, match=r"x must have 3 dimensions, got shape \(2, 32\)"):
        layer(jnp.ones((2, 32)))
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        layer.init_cache(2, 0)
    with pytest.raises(ValueError, match="decode_step takes one token, which axis_name='seq' can't shard"):
        make(axis_name="seq").decode_step(jnp.ones((2, 32)), layer.init_cache(2, 4))
    with pytest.raises(ValueError, match="strategy"):
        make(strategy="star")(inputs())
