"""softmax_attention as users call it: gradients, transformations, rematerialisation and mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests import agreement
from tests.arguments import wrong
from tests.attention.softmax import cases
from tests.attention.softmax.oracle import softmax_oracle_gradients
from tests.meshes import mesh
from zeco_jax.attention.softmax import documents_of, merge, softmax_attention

B, T, H, G, K, V = 2, 12, 4, 2, 8, 6
PACKED = cases.arrays(cases.Case("packed", T, H, G, K, V, B, packed=True))


def loss(q, k, v, segment_ids, dout):
    out = softmax_attention(q, k, v, segment_ids=segment_ids)
    return jnp.sum(out * dout), out


def gradients(q, k, v, dout, segment_ids):
    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v, segment_ids, dout)


WANT = softmax_oracle_gradients(*PACKED[:4], segment_ids=PACKED.segment_ids)


def assert_agrees(found):
    found_gradients, out = found
    for name, got, want in zip(("out", "dq", "dk", "dv"), (out, *found_gradients), (WANT[0], *WANT[1]), strict=True):
        agreement.assert_agrees(name, got, want)


def test_without_jit():
    assert_agrees(gradients(*map(jnp.asarray, PACKED)))


def test_under_vmap():
    by_batch = [x[:, None] for x in PACKED]
    found = jax.jit(jax.vmap(gradients))(*by_batch)
    assert_agrees(jax.tree.map(lambda x: x[:, 0], found))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_over_a_mesh_that_cuts_the_batch(axis_type):
    devices = mesh(axis_type, data=2)
    with jax.set_mesh(devices):
        arrays = [jax.device_put(x, jax.NamedSharding(devices, PartitionSpec("data"))) for x in PACKED]
        assert_agrees(jax.jit(gradients)(*arrays))


def test_inside_shard_map_with_replicated_keys():
    """The cotangents of what every rank has are summed."""
    q, k, v, dout, ids = PACKED
    same = k[:1], v[:1]
    spec, whole = PartitionSpec("data"), PartitionSpec()
    run = jax.shard_map(
        lambda q, k, v, dout, ids: gradients(q, k, v, dout, ids)[0],
        mesh=mesh(data=2), in_specs=(spec, whole, whole, spec, spec), out_specs=(spec, whole, whole),
    )  # fmt: skip
    found = jax.jit(run)(q, *same, dout, ids)
    twice = [np.repeat(x, 2, axis=0) for x in same]
    _, (dq, dk, dv) = softmax_oracle_gradients(q, *twice, dout, segment_ids=ids)
    for name, got, want in zip(
        "qkv", found, (dq, *(np.asarray(x).sum(0, keepdims=True) for x in (dk, dv))), strict=True
    ):
        agreement.assert_agrees(f"d{name}", got, want)


def test_one_token_returns_its_value():
    q, k, v, *_ = (x[:, :1] for x in PACKED)
    np.testing.assert_array_equal(softmax_attention(q, k, v), np.repeat(v, H // G, axis=2))


def test_mixed_dtypes():
    q, k, v, *_ = PACKED
    out = softmax_attention(q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16


def loops(*, saved):
    """How many loops over blocks the gradient under rematerialisation has."""
    policy = jax.checkpoint_policies.save_only_these_names(*saved)
    run = jax.checkpoint(lambda q: jnp.sum(jnp.sin(softmax_attention(q, q, q))), policy=policy)
    text = jax.jit(jax.value_and_grad(run)).lower(jnp.ones((1, 600, 1, 4))).compile().as_text()
    return text.count(" while(")


def test_rematerialisation_that_keeps_the_named_results_does_not_attend_again():
    named = "attention_out", "attention_log_sum_exp"
    again, kept = loops(saved=()), loops(saved=named)
    # Blocks of queries, and in them of keys.
    assert again == kept + 2


def test_documents_are_counted_by_changes():
    ids = jnp.array([[5, 5, -1, 5, 5, 0], [1, 2, 3, 3, 2, 1]])
    assert documents_of(ids).tolist() == [[0, 0, 1, 2, 2, 3], [0, 1, 2, 2, 3, 4]]


def test_merge_with_what_saw_nothing():
    rng = np.random.default_rng(0)
    out, log_sum_exp = rng.normal(size=(3, 4)), rng.normal(size=3)
    nothing = np.zeros((3, 4)), np.full(3, -np.inf)
    for pair in (((out, log_sum_exp), nothing), (nothing, (out, log_sum_exp))):
        merged = merge(*pair)
        np.testing.assert_allclose(merged[0], out, rtol=1e-6)
        np.testing.assert_allclose(merged[1], log_sum_exp, rtol=1e-6)
    merged = merge(nothing, nothing)
    np.testing.assert_array_equal(merged[0], 0)
    np.testing.assert_array_equal(merged[1], -np.inf)


def test_merge_of_far_apart():
    out, log_sum_exp = merge((jnp.array([1.0]), jnp.array(3e4)), (jnp.array([2.0]), jnp.array(-3e4)))
    assert (out.item(), log_sum_exp.item()) == (1.0, 3e4)


def float_array(*shape):
    return np.zeros(shape, np.float32)


ARGUMENTS = {"q": float_array(B, T, H, K), "k": float_array(B, T, G, K), "v": float_array(B, T, G, V)}


@pytest.mark.parametrize(
    "mistake",
    [
        wrong("q", float_array(B, T, H)),
        wrong("q", np.zeros((B, T, H, K), np.int32)),
        wrong("q", [[1.0, 2.0]], label="list"),
        wrong("q", float_array(B, 0, H, K)),
        wrong("q", float_array(B, T + 1, H, K), names="q|k"),
        wrong("q", float_array(B, T, 3, K), names="q|k"),
        wrong("k", None),
        wrong("k", float_array(B, T, G, K + 1)),
        wrong("k", float_array(B, T, 3, K)),
        wrong("v", float_array(B, T, H, V)),
        wrong("v", np.zeros((B, T, G, V), bool)),
        wrong("segment_ids", np.zeros((B, T + 1), np.int32)),
        wrong("segment_ids", float_array(B, T)),
        wrong("segment_ids", [[0] * T] * B, label="list"),
        wrong("scale", "large"),
        wrong("scale", True),
        wrong("backend", "splash"),
    ],
)
def test_mistake_is_named(mistake):
    with pytest.raises((ValueError, TypeError), match=mistake.pattern) as caught:
        softmax_attention(**{**ARGUMENTS, mistake.argument: mistake.value})
    mistake.check(caught.value)
