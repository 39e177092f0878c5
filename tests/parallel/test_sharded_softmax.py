"""sharded_softmax_attention on whole arrays: meshes of both kinds, under jit or not, with every dimension cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import zeco_jax
from tests import agreement
from tests.arguments import wrong
from tests.attention.softmax.oracle import softmax_oracle, softmax_oracle_gradients
from tests.meshes import mesh

KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
RNG = np.random.default_rng(0)
Q, K, V, DOUT = (
    RNG.normal(size=(2, 16, heads, width)).astype(np.float32) for heads, width in ((4, 8), (2, 8), (2, 6), (4, 6))
)
IDS = np.cumsum(RNG.uniform(size=(2, 16)) < 0.2, axis=1).astype(np.int32)


@KINDS
@pytest.mark.parametrize(
    ("axes", "cuts"),
    [
        pytest.param({"data": 2, "seq": 2, "model": 2}, {"batch": "data", "heads": "model"}, id="everything_cut"),
        pytest.param({"other": 2, "seq": 4}, {"strategy": "ring-plain"}, id="unused_axis"),
        pytest.param({"hosts": 2, "chips": 2}, {"seq": ("hosts", "chips")}, id="tuple_of_axes"),
        pytest.param({"seq": 4}, {"strategy": "ulysses"}, id="ulysses"),
        pytest.param({"data": 2}, {"batch": "data", "seq": None}, id="only_the_batch_cut"),
    ],
)
def test_agrees_with_one_device(kind, axes, cuts):
    def loss(q, k, v):
        out = zeco_jax.sharded_softmax_attention(q, k, v, mesh=mesh(kind, **axes), segment_ids=IDS, **cuts)
        return jnp.sum(out * DOUT), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(Q, K, V)
    want_out, want_gradients = softmax_oracle_gradients(Q, K, V, DOUT, segment_ids=IDS)
    agreement.assert_agrees("out", out, want_out)
    for name, gradient, want in zip("qkv", gradients, want_gradients, strict=True):
        agreement.assert_agrees(f"d{name}", gradient, want)


@KINDS
def test_result_lies_on_the_mesh_as_the_queries(kind):
    """Without jit, whatever the inputs: NumPy arrays, or arrays that lie differently."""
    grid = mesh(kind, data=2, seq=2)
    elsewhere = jax.device_put(Q, NamedSharding(grid, PartitionSpec("seq")))
    out = zeco_jax.sharded_softmax_attention(elsewhere, K, V, mesh=grid, batch="data")
    agreement.assert_agrees("out", out, softmax_oracle(Q, K, V))
    assert out.sharding.is_equivalent_to(NamedSharding(grid, PartitionSpec("data", "seq")), out.ndim)


def attend(axes=None, **changed):
    options = {"mesh": mesh(**axes or {"data": 2, "seq": 4}), "q": Q, "k": K, "v": V, **changed}
    return zeco_jax.sharded_softmax_attention(**options)


@pytest.mark.parametrize(
    "mistake",
    [
        wrong("q", Q[..., :7], names="q|k"),
        wrong("k", K[:, :, :0]),
        wrong("v", V[:, :8]),
        wrong("segment_ids", IDS[:1]),
        wrong("scale", "large"),
        wrong("batch", "nowhere", names="batch|mesh"),
        wrong("seq", "nowhere", names="seq|mesh"),
        wrong("heads", "seq", names="heads|seq"),
        wrong("mesh", None),
        wrong("strategy", "teleport"),
        wrong("backend", "abacus"),
    ],
)
def test_mistake_is_named(mistake):
    with pytest.raises((ValueError, TypeError), match=mistake.pattern) as caught:
        attend(**{mistake.argument: mistake.value})
    mistake.check(caught.value)


@pytest.mark.parametrize(
    ("dimension", "axes", "cuts"),
    [
        ("T = 16", {"seq": 3}, {}),
        ("B = 2", {"data": 3, "seq": 2}, {"batch": "data"}),
        ("H = 4", {"model": 3, "seq": 2}, {"heads": "model"}),
        ("G = 2", {"model": 4, "seq": 2}, {"heads": "model"}),
    ],
)
def test_what_the_ranks_do_not_divide_is_named(dimension, axes, cuts):
    with pytest.raises(ValueError, match=rf"\b{dimension}\b"):
        attend(axes, **cuts)
