"""ulysses_attention inside shard_map against the oracle of the whole sequence, and what it sends."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import zeco_jax
from tests import agreement, oracle
from tests.arguments import wrong
from tests.attention import cases
from tests.attention.contract import AnyPackingContract, Float64Contract, LinearAttentionContract
from tests.meshes import mesh
from tests.parallel.shards import over_ranks
from zeco_jax.parallel.ulysses import ulysses_attention
from zeco_jax.pods import collectives_in

# Eight heads, so that eight ranks have one each.
REGIMES = (*cases.EVERY_REGIME, "near_one")
EIGHT_HEADS = (
    cases.Case("channel-every_regime-8_heads", "channel", REGIMES, 257, value_width=8),
    cases.Case("token-packed-8_heads", "token", REGIMES, 100, value_width=24, segments="rank_ends"),
    cases.Case("head-packed-8_heads", "head", ("near_one", "gla") * 4, 64, segments="odd_places"),
    cases.Case("none-final_only-8_heads", "none", ("one",) * 8, 7, loss=("final_state",), options={"scale": 0.3}),
    cases.Case("channel-out_only-8_heads", "channel", REGIMES, 40, initial_state=False, loss=("out",)),
    cases.Case("token-bf16-8_heads", "token", ("near_one", "gla") * 4, 100, dtype="bfloat16"),
)


class UlyssesContract(LinearAttentionContract):
    """A subclass says how many ranks, and what else is special."""

    covers = EIGHT_HEADS
    options: ClassVar[dict] = {}

    def attend(self, *arguments, **options):
        return over_ranks(ulysses_attention, self.ranks, **self.options)(*arguments, **options)


class TestOneRank(UlyssesContract):
    ranks = 1
    covers = EIGHT_HEADS[1:2]


class TestTwoRanks(UlyssesContract, AnyPackingContract):
    ranks = 2
    covers = EIGHT_HEADS[:3]


class TestFourRanks(UlyssesContract):
    ranks = 4
    covers = EIGHT_HEADS[2:4]


class TestEightRanks(UlyssesContract):
    ranks = 8


class TestEightRanksUnchecked(UlyssesContract):
    ranks = 8
    options: ClassVar = {"check_vma": False}
    covers = EIGHT_HEADS[2:5:2]


class TestReferenceBackend(UlyssesContract):
    ranks = 2
    options: ClassVar = {"backend": "reference"}
    covers = EIGHT_HEADS[2:3]


class TestFloat64(UlyssesContract, Float64Contract):
    ranks = 4
    covers = (
        cases.Case(
            "channel-every_regime-8_heads-float64", "channel", REGIMES, 40, value_width=8, dtype="float64",
            gate_dtype="float64", segments="odd_places",
        ),
    )  # fmt: skip


def test_tuple_of_axes_counts_the_last_fastest():
    arrays = cases.arrays(cases.Case("tuple", "token", ("near_one", "gla") * 2, 24, initial_state=False), 4)
    spec = PartitionSpec(None, ("slow", "fast"))

    def local(arguments):
        return ulysses_attention(**arguments, axis_name=("slow", "fast"))

    out, final_state = jax.jit(
        jax.shard_map(local, mesh=mesh(slow=2, fast=2), in_specs=spec, out_specs=(spec, PartitionSpec()))
    )(arrays.differentiable)
    want = oracle.recurrence(**arrays.differentiable)
    agreement.assert_agrees("out", out, want.out)
    agreement.assert_agrees("final_state", final_state, want.final_state)


def test_as_a_schedule_of_linear_attention():
    arrays = cases.arrays(cases.Case("schedule", "channel", ("near_one", "gla") * 2, 24), 4).differentiable
    found, want = (
        jax.jit(over_ranks(operator, 4, **options))(**arrays)
        for operator, options in ((zeco_jax.linear_attention, {"schedule": "ulysses"}), (ulysses_attention, {}))
    )
    jax.tree.map(np.testing.assert_array_equal, found, want)
    alone, _ = zeco_jax.linear_attention(**arrays, schedule="ulysses")
    agreement.assert_agrees("out", alone, want[0])


B, T, H, K, V = 2, 64, 8, 8, 16


def sent_bytes(*, final_state, gradient=False):
    """Bytes of each kind of collective, on 4 ranks."""
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V), "log_decay": (B, T, H, K)}
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def forward(structs):
        results = over_ranks(ulysses_attention, 4)(**structs)
        return results if final_state else results[0]

    def backward(structs, cotangent):
        return jax.vjp(forward, structs)[1](cotangent)

    lowered = (
        jax.jit(backward).lower(structs, jax.ShapeDtypeStruct((B, T, H, V), jnp.float32))
        if gradient
        else jax.jit(forward).lower(structs)
    )
    total: dict[str, int] = {}
    for record in collectives_in(lowered.compile().as_text()):
        total[record.kind] = total.get(record.kind, 0) + record.bytes
    return total


SHARD = B * T // 4 * H * 4


@pytest.mark.parametrize(
    ("uses", "expected"),
    [
        pytest.param({"final_state": False}, {"all-to-all": SHARD * (3 * K + 2 * V)}, id="forward"),
        pytest.param(
            {"final_state": True},
            {"all-to-all": SHARD * (3 * K + 2 * V), "all-reduce": B * H * K * V * 4},
            id="final_state",
        ),
        # q, k, v and the gates go out, dout too; all four gradients come back.
        pytest.param({"final_state": False, "gradient": True}, {"all-to-all": SHARD * (6 * K + 3 * V)}, id="gradient"),
    ],
)
def test_what_is_sent(uses, expected):
    assert sent_bytes(**uses) == expected


@pytest.mark.parametrize(("heads", "ranks"), [(6, 4), (2, 8), (7, 2)])
def test_heads_that_the_ranks_do_not_divide(heads, ranks):
    x = np.zeros((1, 16, heads, 4), np.float32)
    with pytest.raises(ValueError, match=rf"(?s)\bH = {heads}\b.*\b{ranks} ranks\b"):
        over_ranks(ulysses_attention, ranks)(x, x, x)


ARGUMENTS = {name: np.zeros((2, 8, 4, 4), np.float32) for name in "qkv"}


@pytest.mark.parametrize(
    "mistake",
    [
        wrong("k", np.zeros((2, 8, 4, 3), np.float32)),
        wrong("log_decay", np.zeros(3, np.float32)),
        wrong("segment_ids", np.zeros((2, 8), np.float32)),
        wrong("initial_state", np.zeros((2, 4, 5, 4), np.float32)),
        wrong("scale", "large"),
        wrong("backend", "cuda"),
        wrong("chunk_size", 3),
    ],
)
def test_mistake_is_named(mistake):
    with pytest.raises((ValueError, TypeError), match=mistake.pattern) as caught:
        over_ranks(ulysses_attention, 4)(**{**ARGUMENTS, mistake.argument: mistake.value})
    mistake.check(caught.value)


def test_axis_not_in_scope():
    with pytest.raises(ValueError, match=r"\baxis_name\b"):
        ulysses_attention(**ARGUMENTS, axis_name="seq")
