"""What the tests of layers and models have in common."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.agreement import assert_agrees
from tests.meshes import mesh
from zeco_jax.parallel import SequenceSharding

# 40 tokens: borders inside a shard and between shards of five tokens, documents of one token, an id that comes back.
SEGMENT_IDS = np.repeat([[0, 1, 2, 3, 2, 5], [7, 7, 7, 8, 8, 8]], [7, 6, 1, 1, 15, 10], axis=1).astype(np.int32)

meshes = pytest.mark.parametrize(
    ("shape", "axis_type"),
    [((2, 4), AxisType.Auto), ((1, 8), AxisType.Auto), ((2, 4), AxisType.Explicit)],
    ids=["2x4-auto", "1x8-auto", "2x4-explicit"],
)


def make_sharding(shape, axis_type=AxisType.Auto) -> SequenceSharding:
    """Batch over "data", tokens over "seq"."""
    return SequenceSharding(mesh(axis_type, data=shape[0], seq=shape[1]), batch="data")


def on_mesh(module):
    """The module with its parameters copied to every device, which Explicit axes need."""
    everywhere = NamedSharding(module.sharding.mesh, PartitionSpec())
    nnx.update(module, jax.device_put(nnx.state(module), everywhere))
    return module


def value_and_gradients(module, *arguments):
    """Output of the module and the gradients of a weighted sum of it in parameters and first argument."""
    definition, parameters = nnx.split(module)

    def weighted_sum(parameters, x):
        out = nnx.merge(definition, parameters)(x, *arguments[1:])
        weights = jax.random.normal(jax.random.key(5), out.shape)
        return (out * weights).sum(), out

    wanted = (0, 1) if np.issubdtype(arguments[0].dtype, np.floating) else 0
    gradients, out = jax.jit(jax.grad(weighted_sum, wanted, has_aux=True))(parameters, arguments[0])
    return out, gradients


def assert_trees_agree(name, got, want, dtype="float32"):
    """Every leaf agrees, and the message says which doesn't."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, leaf), expected in pairs:
        assert_agrees(name + jax.tree_util.keystr(path), leaf, expected, dtype)
