"""linear_attention inside shard_map, over any number of ranks, against the oracle of the whole sequence."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import zeco_jax
from tests import agreement, oracle
from tests.attention import cases
from tests.attention.contract import AnyPackingContract, Float64Contract, LinearAttentionContract
from tests.meshes import mesh
from tests.parallel.shards import REPLICATED, TOKENS, over_ranks

attend_on = partial(over_ranks, zeco_jax.linear_attention)


class ZecoContract(LinearAttentionContract):
    """A subclass says how many ranks, and what else is special."""

    covers = cases.ESSENTIAL
    options: ClassVar[dict] = {}

    def attend(self, *arguments, **options):
        return attend_on(self.ranks, **self.options)(*arguments, **options)


class TestOneRank(ZecoContract):
    ranks = 1
    covers = cases.ESSENTIAL[1:3]


class TestTwoRanks(ZecoContract):
    ranks = 2


class TestThreeRanks(ZecoContract):
    ranks = 3


class TestFiveRanks(ZecoContract, AnyPackingContract):
    ranks = 5


class TestEightRanks(ZecoContract, AnyPackingContract):
    ranks = 8
    covers = cases.EVERY


class TestEightRanksUnchecked(ZecoContract):
    ranks = 8
    options: ClassVar = {"check_vma": False}
    covers = cases.ESSENTIAL[:3]


class TestOneRankUnchecked(ZecoContract):
    ranks = 1
    options: ClassVar = {"check_vma": False}
    covers = cases.ESSENTIAL[1:2]


class TestChainByName(ZecoContract):
    ranks = 5
    options: ClassVar = {"schedule": "chain"}
    covers = cases.ESSENTIAL[:1]


@pytest.mark.gpu
class TestHopperOnTwoGpus(ZecoContract):
    """Two stretches or more on each rank; documents that begin and end at its borders."""

    ranks = 2
    options: ClassVar = {"backend": "hopper"}
    covers = tuple(
        cases.Case(
            f"{decay}-{segments or 'one_document'}-{key_width}-{value_width}",
            decay,
            ("near_one", "gla", "mixed", "sometimes_zero"),
            tokens=600,
            key_width=key_width,
            value_width=value_width,
            dtype="bfloat16",
            segments=segments,
        )
        for decay, segments in (("channel", None), ("channel", "rank_ends"), ("token", "rank_ends"))
        for key_width, value_width in ((64, 64), (128, 128), (256, 512))
    )


class TestReferenceOverRanks(ZecoContract):
    ranks = 3
    options: ClassVar = {"backend": "reference"}
    covers = cases.ESSENTIAL[:3]


class TestFloat64OverRanks(ZecoContract, Float64Contract):
    ranks = 4
    covers = Float64Contract.covers


def test_final_state_is_the_same_on_every_rank():
    arrays = cases.arrays(cases.Case("same", "token", ("near_one",), tokens=16), 8).differentiable

    def local(q, k, v, log_decay):
        return zeco_jax.linear_attention(q, k, v, log_decay, axis_name="seq")[1][None]

    # check_vma off, so that nothing but the values makes them equal.
    run = jax.shard_map(local, mesh=mesh(seq=8), in_specs=TOKENS, out_specs=PartitionSpec("seq"), check_vma=False)
    arguments = [arrays[name] for name in ("q", "k", "v", "log_decay")]
    states = jax.jit(run)(*arguments)
    want = oracle.recurrence(*arguments)
    for state in states:
        np.testing.assert_array_equal(state, states[0])
    agreement.assert_agrees("final_state", states[0], want.final_state)


def test_early_ranks_matter_at_decay_near_one():
    """The case that a broken exchange hides from: here the first rank's tokens reach the last rank."""
    arrays = cases.arrays(cases.Case("early", "token", ("near_one",), tokens=64, initial_state=False), 8)
    whole = oracle.recurrence(**arrays.differentiable)
    alone = oracle.recurrence(**{name: x[:, 56:] for name, x in arrays.differentiable.items()})
    assert agreement.relative_rms(alone.out, whole.out[:, 56:]) > 0.5


@pytest.mark.parametrize("uses", ["out", "final_state"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_gradient_taken_inside_shard_map(ranks, uses):
    """Each rank differentiates the sum of all ranks' losses itself."""
    case = cases.Case("inside", "head", ("near_one", "gla"), tokens=32)
    arrays = cases.arrays(case, ranks)

    def local(arguments, dout, dfinal):
        def loss(arguments):
            out, final_state = zeco_jax.linear_attention(**arguments, axis_name="seq")
            if uses == "out":
                return jax.lax.psum(jnp.sum(out * dout), "seq")
            return jnp.sum(final_state * dfinal)

        return jax.grad(loss)(arguments)

    specs = {name: TOKENS if name in "qkv" else REPLICATED for name in arrays.differentiable}
    gradients = jax.jit(
        jax.shard_map(local, mesh=mesh(seq=ranks), in_specs=(specs, TOKENS, REPLICATED), out_specs=specs)
    )(arrays.differentiable, arrays.dout, arrays.dfinal)
    cotangent = {"dout": arrays.dout} if uses == "out" else {"dfinal": arrays.dfinal}
    want = oracle.recurrence(**arrays.differentiable, **cotangent)
    for name, gradient in gradients.items():
        agreement.assert_agrees(f"d{name}", gradient, want.gradients[name])


def test_gradient_of_local_losses_without_checks():
    """With check_vma off each rank may differentiate its own loss: the result is the gradient of their sum."""
    arrays = cases.arrays(cases.Case("local", "token", tokens=24, initial_state=False), 4)

    def local(arguments, dout):
        def loss(arguments):
            return jnp.sum(zeco_jax.linear_attention(**arguments, axis_name="seq")[0] * dout)

        return jax.grad(loss)(arguments)

    gradients = jax.jit(jax.shard_map(local, mesh=mesh(seq=4), in_specs=TOKENS, out_specs=TOKENS, check_vma=False))(
        arrays.differentiable, arrays.dout
    )
    want = oracle.recurrence(**arrays.differentiable, dout=arrays.dout)
    for name, gradient in gradients.items():
        agreement.assert_agrees(f"d{name}", gradient, want.gradients[name])


def test_tuple_of_axes():
    arrays = cases.arrays(cases.Case("tuple", tokens=24, initial_state=False, segments="odd_places"), 6)
    spec = PartitionSpec(None, ("slow", "fast"))

    def local(arguments, segment_ids):
        out, final_state = zeco_jax.linear_attention(**arguments, segment_ids=segment_ids, axis_name=("slow", "fast"))
        return out, final_state

    @jax.jit
    def run(arguments, segment_ids):
        return jax.shard_map(local, mesh=mesh(slow=2, fast=3), in_specs=spec, out_specs=(spec, REPLICATED))(
            arguments, segment_ids
        )

    results, pullback = jax.vjp(lambda arguments: run(arguments, arrays.segment_ids), arrays.differentiable)
    gradients = pullback((arrays.dout, arrays.dfinal))[0]
    want = oracle.recurrence(
        **arrays.differentiable, segment_ids=arrays.segment_ids, dout=arrays.dout, dfinal=arrays.dfinal
    )
    agreement.assert_agrees("out", results[0], want.out)
    agreement.assert_agrees("final_state", results[1], want.final_state)
    for name, gradient in gradients.items():
        agreement.assert_agrees(f"d{name}", gradient, want.gradients[name])


def test_remat_scan_and_vmap_inside_shard_map():
    """Layers scanned under rematerialisation, with a mapped axis in front: one pass of a deep model."""
    case = cases.Case("layers", "token", ("near_one", "gla"), tokens=24, value_width=16, initial_state=False)
    arrays = cases.arrays(case, 4)
    q, k, v, log_decay = (arrays.differentiable[name] for name in ("q", "k", "v", "log_decay"))

    def local(q, k, v, log_decay, dout):
        def loss(v, q, k, g):
            def layer(v, _):
                attend = jax.vmap(lambda q, k, v, g: zeco_jax.linear_attention(q, k, v, g, axis_name="seq")[0])
                return jax.checkpoint(attend)(q[:, None], k[:, None], v, g[:, None]), None

            return jax.lax.psum(jnp.sum(jax.lax.scan(layer, v[:, None], length=2)[0][:, 0] * dout), "seq")

        return jax.grad(loss, argnums=(0, 1))(v, q, k, log_decay)

    dv, dq = jax.jit(jax.shard_map(local, mesh=mesh(seq=4), in_specs=TOKENS, out_specs=TOKENS))(
        q, k, v, log_decay, arrays.dout
    )
    first = oracle.recurrence(q, k, v, log_decay)
    second = oracle.recurrence(q, k, first.out, log_decay, dout=arrays.dout)
    first = oracle.recurrence(q, k, v, log_decay, dout=second.gradients["v"])
    agreement.assert_agrees("dv", dv, first.gradients["v"])
    agreement.assert_agrees("dq", dq, first.gradients["q"] + second.gradients["q"])
