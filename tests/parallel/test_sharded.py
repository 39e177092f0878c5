"""sharded_linear_attention on whole arrays: meshes of both kinds, under jit or not, with every dimension cut."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import zeco_jax
from tests import agreement, oracle
from tests.attention import cases
from tests.attention.contract import AnyPackingContract, LinearAttentionContract
from tests.meshes import mesh
from zeco_jax.parallel import SequenceSharding

KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
FOUR_KINDS = (
    cases.Case("none", "none", ("one", "one"), tokens=32, options={"scale": 0.5}),
    cases.Case("head", "head", ("near_one", "gla"), tokens=32, segments="odd_places"),
    cases.Case("token", "token", ("near_one", "mixed"), tokens=32, segments="rank_ends"),
    cases.Case("channel", "channel", ("near_one", "zero"), tokens=32, segments="after_rank_starts"),
)


class ShardedContract(LinearAttentionContract):
    """A subclass says on which mesh, and which axis cuts what."""

    covers = FOUR_KINDS
    kind = AxisType.Auto
    axes: ClassVar[dict] = {"seq": 8}
    cuts: ClassVar[dict] = {}

    @property
    def ranks(self):
        """Along the sequence."""
        return self.axes["seq"]

    def attend(self, *arguments, **options):
        return zeco_jax.sharded_linear_attention(*arguments, mesh=mesh(self.kind, **self.axes), **self.cuts, **options)


class TestAuto(ShardedContract, AnyPackingContract):
    pass


class TestExplicit(ShardedContract):
    kind = AxisType.Explicit


class TestDataAndSequence(ShardedContract):
    axes: ClassVar = {"data": 2, "seq": 4}
    cuts: ClassVar = {"batch": "data"}
    covers = FOUR_KINDS[:2]


class TestDataAndSequenceExplicit(ShardedContract):
    kind = AxisType.Explicit
    axes: ClassVar = {"data": 2, "seq": 4}
    cuts: ClassVar = {"batch": "data"}
    covers = FOUR_KINDS[2:]


class TestHeads(ShardedContract):
    axes: ClassVar = {"seq": 4, "heads": 2}
    cuts: ClassVar = {"heads": "heads"}
    covers = FOUR_KINDS[1:3]


class TestEverythingCutExplicit(ShardedContract, AnyPackingContract):
    kind = AxisType.Explicit
    axes: ClassVar = {"data": 2, "seq": 2, "model": 2}
    cuts: ClassVar = {"batch": "data", "heads": "model"}


class TestUnusedAxis(ShardedContract):
    """An axis that cuts nothing: the arrays are replicated over it."""

    axes: ClassVar = {"other": 2, "seq": 3}
    covers = FOUR_KINDS[1:2]


class TestOnlyTheBatchIsCut(ShardedContract):
    """Plain data parallelism: every device has whole sequences."""

    axes: ClassVar = {"data": 2}
    cuts: ClassVar = {"batch": "data", "seq": None}
    ranks = 1
    covers = FOUR_KINDS[1:2]


class TestOneDevice(ShardedContract):
    axes: ClassVar = {"seq": 1}
    covers = FOUR_KINDS[2:3]


def test_tuple_of_axes_cuts_the_sequence():
    arrays = cases.arrays(FOUR_KINDS[2], 8)
    run = partial(
        zeco_jax.sharded_linear_attention, mesh=mesh(hosts=2, chips=4), seq=("hosts", "chips"),
        segment_ids=arrays.segment_ids,
    )  # fmt: skip
    out, final_state = jax.jit(run)(**arrays.differentiable)
    want = oracle.recurrence(**arrays.differentiable, segment_ids=arrays.segment_ids)
    agreement.assert_agrees("out", out, want.out)
    agreement.assert_agrees("final_state", final_state, want.final_state)


@KINDS
def test_results_lie_on_the_mesh_as_the_inputs(kind):
    grid = mesh(kind, data=2, seq=4)
    sharding = SequenceSharding(grid, batch="data")
    x = jax.device_put(jnp.ones((2, 8, 1, 4)), NamedSharding(grid, sharding.spec(4)))
    run = jax.jit(partial(zeco_jax.sharded_linear_attention, mesh=grid, batch="data"))
    out, final_state = run(x, x, x)
    assert out.sharding.is_equivalent_to(NamedSharding(grid, PartitionSpec("data", "seq")), out.ndim)
    assert final_state.sharding.is_equivalent_to(NamedSharding(grid, PartitionSpec("data")), final_state.ndim)


@KINDS
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_arrays_from_anywhere(kind, jit):
    """NumPy arrays, arrays on one device, arrays laid out differently: all are accepted."""
    grid = mesh(kind, seq=4)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(4, 8, 2, 4)).astype(np.float32) for _ in range(3))
    want = oracle.recurrence(q, k, v)
    run = partial(zeco_jax.sharded_linear_attention, mesh=grid)
    run = jax.jit(run) if jit else run
    by_batch = NamedSharding(grid, PartitionSpec("seq"))
    on_mesh = [jax.device_put(x, by_batch) for x in (q, k, v)]
    for arguments in ((q, k, v), tuple(on_mesh)):
        agreement.assert_agrees("out", run(*arguments)[0], want.out)


@KINDS
def test_under_set_mesh(kind):
    grid = mesh(kind, data=2, seq=4)
    arrays = cases.arrays(FOUR_KINDS[1], 4)
    with jax.set_mesh(grid):
        out, _ = jax.jit(partial(zeco_jax.sharded_linear_attention, mesh=grid, batch="data"))(**arrays.differentiable)
    agreement.assert_agrees("out", out, oracle.recurrence(**arrays.differentiable).out)


@KINDS
def test_between_other_computations(kind):
    """As in a model: what comes before and after is partitioned by XLA."""
    grid = mesh(kind, data=2, seq=4)
    sharding = SequenceSharding(grid, batch="data")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 16, 8)).astype(np.float32)
    weight = rng.normal(size=(8, 3, 2, 4)).astype(np.float32) / 8**0.5

    def model(weight, x, attend):
        q, k, v = jnp.moveaxis(jnp.einsum("btd,dahk->btahk", x, weight), 2, 0)
        out, _ = attend(q, k, v)
        return jnp.sum(jnp.tanh(out) ** 2)

    def sharded(weight, x):
        attend = partial(zeco_jax.sharded_linear_attention, mesh=grid, batch="data")
        return model(weight, sharding.constrain(x), attend)

    want = jax.grad(lambda weight: model(weight, x, zeco_jax.linear_attention))(weight)
    with jax.set_mesh(grid):
        x_placed = jax.device_put(x, NamedSharding(grid, sharding.spec(3)))
        weight_placed = jax.device_put(weight, NamedSharding(grid, PartitionSpec()))
        got = jax.jit(jax.grad(sharded))(weight_placed, x_placed)
    agreement.assert_agrees("dweight", got, want)


@KINDS
def test_constrain_lays_out(kind):
    sharding = SequenceSharding(mesh(kind, data=2, seq=4), batch="data")
    with jax.set_mesh(sharding.mesh):
        x = jax.jit(sharding.constrain)(jnp.ones((2, 8, 3)))
    assert x.sharding.is_equivalent_to(NamedSharding(sharding.mesh, PartitionSpec("data", "seq")), 3)


def test_spec():
    sharding = SequenceSharding(mesh(data=2, seq=4), batch="data")
    assert sharding.spec() == PartitionSpec("data", "seq", None)
    assert sharding.spec(2) == PartitionSpec("data", "seq")
    assert hash(sharding) == hash(SequenceSharding(mesh(data=2, seq=4), batch="data"))
