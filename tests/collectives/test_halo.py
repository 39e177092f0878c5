import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.meshes import RANKS, mesh, per_rank
from zeco_jax.collectives import halo
from zeco_jax.pods import collectives_in


def expected_halo(shards: np.ndarray, width: int) -> np.ndarray:
    """[P, B, L, D] -> [P, B, width, D]: what lies before each shard, zeros before the first."""
    ranks, batch, length, features = shards.shape
    line = np.concatenate([np.zeros((batch, width, features), shards.dtype), *shards], 1)
    return np.stack([line[:, p * length : p * length + width] for p in range(ranks)])


def make(ranks: int, length: int, dtype="float32") -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ranks, 2, length, 3)).astype(dtype)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize(("length", "width"), [(4, 3), (4, 4), (1, 3), (2, 3), (2, 0), (1, 9)])
@pytest.mark.parametrize("ranks", RANKS)
def test_halo_and_its_gradient(ranks, length, width, check_vma):
    shards = make(ranks, length)
    rng = np.random.default_rng(1)
    cotangent = rng.normal(size=(ranks, 2, width, 3)).astype(np.float32)
    run = jax.jit(per_rank(lambda x: halo(x, width, "seq"), ranks, check_vma=check_vma))
    result, pullback = jax.vjp(run, shards)
    np.testing.assert_array_equal(result, expected_halo(shards, width))

    # The halo is linear: its transpose keeps the inner product with any other input.
    other = rng.normal(size=shards.shape).astype(np.float32)
    gradient = pullback(jnp.asarray(cotangent))[0]
    np.testing.assert_allclose(np.vdot(gradient, other), np.vdot(cotangent, expected_halo(other, width)), atol=1e-4)


def test_other_axis_and_integers():
    tokens = np.arange(24, dtype=np.int32).reshape(4, 6)
    run = per_rank(lambda x: halo(x, 2, "seq", axis=0), 4)
    assert run(tokens).tolist() == [[0, 0], [4, 5], [10, 11], [16, 17]]
    negative = per_rank(lambda x: halo(x, 2, "seq", axis=-1), 4)
    np.testing.assert_array_equal(negative(tokens), run(tokens))


def test_tuple_of_axes():
    tokens = np.arange(1, 13, dtype=np.float32)
    spec = PartitionSpec(("slow", "fast"))
    run = jax.shard_map(
        lambda x: halo(x, 1, ("slow", "fast"), axis=0), mesh=mesh(slow=2, fast=3), in_specs=spec, out_specs=spec
    )
    assert run(tokens).tolist() == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(("length", "width", "permutes"), [(4, 3, 1), (2, 3, 2), (4, 0, 0)])
def test_no_more_than_the_halo_travels(length, width, permutes):
    shards = make(8, length)
    run = jax.jit(per_rank(lambda x: halo(x, width, "seq"), 8))
    records = collectives_in(run.lower(shards).compile().as_text())
    assert [record.kind for record in records] == ["collective-permute"] * permutes
    assert sum(record.bytes for record in records) == 2 * width * 3 * 4


def test_negative_width_is_named():
    with pytest.raises(ValueError, match="width"):
        per_rank(lambda x: halo(x, -1, "seq"), 2)(make(2, 4))


def test_axis_out_of_range_is_named():
    with pytest.raises(ValueError, match="axis"):
        per_rank(lambda x: halo(x, 1, "seq", axis=5), 2)(make(2, 4))


@pytest.mark.parametrize("width", [1.5, "3"])
def test_width_must_be_an_integer(width):
    with pytest.raises((TypeError, ValueError), match="width"):
        per_rank(lambda x: halo(x, width, "seq"), 2)(make(2, 4))


def test_axis_name_not_in_scope():
    with pytest.raises(ValueError, match="axis_name"):
        halo(make(1, 4)[0], 1, "nowhere")
