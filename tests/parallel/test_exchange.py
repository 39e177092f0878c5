"""What crosses the wire, read from compiled programs, and what waits for it, read from their jaxprs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import zeco_jax
from tests.dependence import waiting_flops
from tests.meshes import mesh
from tests.parallel.test_zeco import attend_on
from zeco_jax.pods import collectives_in

B, T, H, K, V = 2, 120, 2, 8, 16
STATE_BYTES = B * H * K * V * 4
DECAYS = ("none", "head", "token", "channel")


def arguments(decay="channel", *, tokens=T, initial_state=False, dtype="float32"):
    shapes = {"q": (B, tokens, H, K), "k": (B, tokens, H, K), "v": (B, tokens, H, V)}
    structs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    gates = {"head": (H,), "token": (B, tokens, H), "channel": (B, tokens, H, K)}
    if decay != "none":
        structs["log_decay"] = jax.ShapeDtypeStruct(gates[decay], jnp.float32)
    if initial_state:
        structs["initial_state"] = jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)
    return structs


def collectives_of(function, *structs):
    return collectives_in(jax.jit(function).lower(*structs).compile().as_text())


chain_on = partial(attend_on, schedule="chain")


def attend(ranks, structs, **options):
    return chain_on(ranks, **options)(**structs)


def assert_one_exchange(records, ranks, *, reverse=False, state_bytes=STATE_BYTES):
    """One chain of K blocks over the ranks: P + K - 2 steps, one state on each link, nothing else."""
    step = -1 if reverse else 1
    sent = dict.fromkeys(range(ranks), 0)
    blocks = len(records) - ranks + 2
    assert blocks >= 1
    for record in records:
        assert record.kind == "collective-permute"
        assert record.bytes * blocks == state_bytes
        for source, target in record.pairs:
            assert target == source + step
            sent[source] += record.bytes
    last = 0 if reverse else ranks - 1
    assert sent == {rank: 0 if rank == last else state_bytes for rank in range(ranks)}


def directions(records):
    """Permutes to the right, permutes to the left, and everything else."""
    permutes = [record for record in records if record.kind == "collective-permute"]
    right = [record for record in permutes if all(target > source for source, target in record.pairs)]
    left = [record for record in permutes if all(target < source for source, target in record.pairs)]
    return right, left, [record for record in records if record not in right + left]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_forward_is_one_exchange(ranks, decay):
    records = collectives_of(lambda structs: attend(ranks, structs)[0], arguments(decay))
    assert_one_exchange(records, ranks)


def test_states_travel_in_float32_and_nothing_else_does():
    records = collectives_of(lambda structs: attend(4, structs)[0], arguments(dtype="bfloat16"))
    assert_one_exchange(records, 4)


def test_initial_state_costs_no_exchange():
    records = collectives_of(lambda structs: attend(4, structs)[0], arguments(initial_state=True))
    assert_one_exchange(records, 4)


def test_one_rank_exchanges_nothing():
    def gradient(structs):
        return jax.grad(lambda structs: jnp.sum(attend(1, structs)[0]))(structs)

    assert collectives_of(gradient, arguments()) == []


def test_only_a_used_final_state_is_shared():
    records = collectives_of(lambda structs: attend(4, structs), arguments())
    right, left, others = directions(records)
    assert_one_exchange(right, 4)
    assert left == []
    assert [(record.kind, record.bytes) for record in others] == [("all-reduce", STATE_BYTES)]


def test_only_packed_documents_send_an_id():
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    records = collectives_of(lambda structs, ids: chain_on(4)(**structs, segment_ids=ids)[0], arguments(), ids)
    id_bytes = B * 4
    halos = [record for record in records if record.bytes == id_bytes]
    assert len(halos) == 1
    assert_one_exchange([record for record in records if record not in halos], 4)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_gradient_adds_one_reverse_exchange_and_nothing_for_the_gates(decay, check_vma):
    ranks = 5

    def gradient(structs, dout):
        return jax.vjp(lambda structs: attend(ranks, structs, check_vma=check_vma)[0], structs)[1](dout)

    dout = jax.ShapeDtypeStruct((B, T, H, V), jnp.float32)
    right, left, others = directions(collectives_of(gradient, arguments(decay), dout))
    assert_one_exchange(right, ranks)
    assert_one_exchange(left, ranks, reverse=True)
    assert others == []


def test_gradient_through_final_state_adds_nothing_but_the_final_state():
    def gradient(structs, dfinal):
        return jax.vjp(lambda structs: attend(4, structs)[1], structs)[1](dfinal)

    dfinal = jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)
    right, left, others = directions(collectives_of(gradient, arguments(), dfinal))
    assert_one_exchange(left, 4, reverse=True)
    assert_one_exchange(right, 4)
    assert all(record.kind == "all-reduce" for record in others)
    assert sum(record.bytes for record in others) <= STATE_BYTES


def test_gradients_of_replicated_arguments_are_summed_once():
    """One gate per head and the initial state lie on every rank: their gradients are the one thing to add up."""

    def gradient(structs, dout):
        return jax.vjp(lambda structs: attend(4, structs)[0], structs)[1](dout)

    dout = jax.ShapeDtypeStruct((B, T, H, V), jnp.float32)
    right, left, others = directions(collectives_of(gradient, arguments("head", initial_state=True), dout))
    assert_one_exchange(right, 4)
    assert_one_exchange(left, 4, reverse=True)
    assert all(record.kind == "all-reduce" for record in others)
    assert sum(record.bytes for record in others) == STATE_BYTES + 4 * H


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_whole_arrays_are_not_moved(kind):
    """What lies on the mesh already stays there: sharded_linear_attention adds no collective of its own."""
    grid = mesh(kind, data=2, seq=4)
    cut = NamedSharding(grid, PartitionSpec("data", "seq"))
    structs = {
        name: jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=cut) for name, struct in arguments().items()
    }

    def gradient(structs, dout):
        run = partial(zeco_jax.sharded_linear_attention, mesh=grid, batch="data", schedule="chain")
        return jax.vjp(lambda structs: run(**structs)[0], structs)[1](dout)

    dout = jax.ShapeDtypeStruct((B, T, H, V), jnp.float32, sharding=cut)
    right, left, others = directions(collectives_of(gradient, structs, dout))
    assert others == []
    for records in (right, left):
        blocks = len(records) - 4 + 2
        assert sum(record.bytes * len(record.pairs) for record in records) == 2 * 3 * STATE_BYTES // 2
        assert {record.bytes for record in records} == {STATE_BYTES // 2 // blocks}


# Chunks much longer than the state is wide, so that work inside the chunks outweighs what needs the state.
CHUNK = 64
TOKENS_PER_RANK = 2 * CHUNK
PRODUCT_WITH_STATE = 2 * B * TOKENS_PER_RANK * H * K * V
# Queries with keys, and scores with values, counting the lower triangle only.
INSIDE_CHUNKS = B * TOKENS_PER_RANK * CHUNK * H * (K + V)


def in_long_chunks(structs):
    return chain_on(4, chunk_size=CHUNK)(**structs)[0]


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_only_products_with_the_state_wait_for_it(decay):
    """Per token: its query times the state, and its key and value into the next chunk's state."""
    flops = waiting_flops(in_long_chunks, arguments(decay, tokens=4 * TOKENS_PER_RANK))
    assert PRODUCT_WITH_STATE <= flops.waiting <= 2 * PRODUCT_WITH_STATE
    assert flops.free >= INSIDE_CHUNKS + PRODUCT_WITH_STATE


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_gradient_waits_only_where_it_needs_the_cotangent_of_the_state(decay):
    def gradient(structs, dout):
        return jax.vjp(in_long_chunks, structs)[1](dout)

    dout = jax.ShapeDtypeStruct((B, 4 * TOKENS_PER_RANK, H, V), jnp.float32)
    flops = waiting_flops(gradient, arguments(decay, tokens=4 * TOKENS_PER_RANK), dout, reverse=True)
    # dq, dk, dv, the state's own cotangent, and the chunk's states once more.
    assert flops.waiting <= 6 * PRODUCT_WITH_STATE
    assert flops.free >= 3 * INSIDE_CHUNKS


def test_dependence_is_told_apart():
    """The measure itself: one product before the exchange, two after it, one beside it."""

    def local(x):
        before = x @ x
        arrived = jax.lax.ppermute(before, "seq", [(0, 1)])
        return arrived @ x @ x + x @ x

    spec = PartitionSpec("seq")
    run = jax.shard_map(local, mesh=mesh(seq=2), in_specs=spec, out_specs=spec)
    product = 2 * 4**3
    x = np.zeros((8, 4), np.float32)
    assert waiting_flops(run, x) == (2 * product, 2 * product)
    assert waiting_flops(run, x, reverse=True) == (0, 4 * product)
