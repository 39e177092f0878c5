import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import zeco_jax
from tests import agreement, oracle
from tests.arguments import wrong
from tests.collectives.exchanges import HEADS, KEYS, VALUES, make
from tests.meshes import RANKS, mesh, per_rank
from zeco_jax.pods import collectives_in

ROWS = HEADS * KEYS


def scan(ranks: int, *, check_vma: bool = True, **options):
    """all_scan over `ranks` as a jitted function of what `make` makes."""

    def run(state, decay, initial_state=None):
        initial_states = None if initial_state is None else jnp.broadcast_to(initial_state, state.shape)

        def local(state, decay, initial_state):
            return zeco_jax.all_scan(state, decay, "seq", initial_state=initial_state, **options)

        return per_rank(local, ranks, check_vma=check_vma)(state, decay, initial_states)

    return jax.jit(run)


def assert_agrees(arrays, cotangent, function, **options):
    """The entering states and every gradient."""
    result, pullback = jax.vjp(lambda arrays: function(**arrays), arrays)
    gradients = pullback(jnp.asarray(cotangent))[0]
    want = oracle.all_scan(**arrays, **options, dstate_in=cotangent)
    agreement.assert_agrees("state_in", result, want.out)
    for name, gradient in gradients.items():
        agreement.assert_agrees(f"d{name}", gradient, want.gradients[name])


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("decay", ["channel", "head"])
@pytest.mark.parametrize("ranks", RANKS)
def test_agrees_with_oracle(ranks, decay, check_vma):
    arrays, cotangent = make(ranks, decay)
    assert_agrees(arrays, cotangent, scan(ranks, check_vma=check_vma))


@pytest.mark.parametrize("blocks", [1, 2, 4, ROWS, ROWS + 3])
@pytest.mark.parametrize("ranks", [3, 8])
def test_blocks_do_not_change_the_result(ranks, blocks):
    arrays, cotangent = make(ranks, "channel")
    assert_agrees(arrays, cotangent, scan(ranks, blocks=blocks))


@pytest.mark.parametrize("decay", ["channel", "head"])
@pytest.mark.parametrize("ranks", RANKS)
def test_reverse(ranks, decay):
    arrays, cotangent = make(ranks, decay)
    assert_agrees(arrays, cotangent, scan(ranks, blocks=2, reverse=True), reverse=True)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_zero_enters_without_initial_state(reverse):
    arrays, cotangent = make(5, "channel")
    del arrays["initial_state"]
    assert_agrees(arrays, cotangent, scan(5, reverse=reverse), reverse=reverse)


def test_decays_of_one_and_zero():
    """Decay one: nothing is forgotten. Decay zero: each rank sees its neighbour only."""
    arrays, cotangent = make(8, "head")
    arrays["decay"] = np.stack([np.ones(8), np.zeros(8)], 1).astype(np.float32)
    assert_agrees(arrays, cotangent, scan(8))
    state_in = np.asarray(scan(8)(**arrays))
    np.testing.assert_array_equal(state_in[1:, 1], arrays["state"][:-1, 1])


def test_replicated_arguments_get_the_gradient_of_all_ranks():
    ranks = 4
    rng = np.random.default_rng(0)
    state = rng.normal(size=(HEADS, KEYS, VALUES)).astype(np.float32)
    decay = rng.uniform(size=(HEADS, KEYS)).astype(np.float32)
    cotangent = rng.normal(size=(ranks, HEADS, KEYS, VALUES)).astype(np.float32)

    def run(state, decay, initial_state):
        def local(state, decay, initial_state):
            return zeco_jax.all_scan(state, decay, "seq", initial_state=initial_state)[None]

        replicated = PartitionSpec()
        return jax.shard_map(local, mesh=mesh(seq=ranks), in_specs=(replicated,) * 3, out_specs=PartitionSpec("seq"))(
            state, decay, initial_state
        )

    result, pullback = jax.vjp(jax.jit(run), state, decay, state)
    dstate, ddecay, dinitial = pullback(jnp.asarray(cotangent))
    want = oracle.all_scan(
        np.stack([state] * ranks), np.stack([decay] * ranks), initial_state=state, dstate_in=cotangent
    )
    agreement.assert_agrees("state_in", result, want.out)
    agreement.assert_agrees("dstate", dstate, want.gradients["state"].sum(0))
    agreement.assert_agrees("ddecay", ddecay, want.gradients["decay"].sum(0))
    agreement.assert_agrees("dinitial_state", dinitial, want.gradients["initial_state"])


def test_tuple_of_axes_counts_the_last_fastest():
    arrays, _ = make(6, "channel")
    spec = PartitionSpec(("slow", "fast"))

    def local(state, decay):
        return zeco_jax.all_scan(state[0], decay[0], ("slow", "fast"), blocks=2)[None]

    run = jax.shard_map(local, mesh=mesh(slow=2, fast=3), in_specs=spec, out_specs=spec)
    state_in = jax.jit(run)(arrays["state"], arrays["decay"])
    agreement.assert_agrees("state_in", state_in, oracle.all_scan(arrays["state"], arrays["decay"]).out)


def test_one_scan_per_row_of_the_other_axis():
    arrays, _ = make(8, "channel")
    spec = PartitionSpec(("data", "seq"))

    def local(state, decay):
        return zeco_jax.all_scan(state[0], decay[0], "seq")[None]

    run = jax.shard_map(local, mesh=mesh(data=2, seq=4), in_specs=spec, out_specs=spec)
    state_in = jax.jit(run)(arrays["state"], arrays["decay"])
    for row in (slice(0, 4), slice(4, 8)):
        want = oracle.all_scan(arrays["state"][row], arrays["decay"][row])
        agreement.assert_agrees("state_in", state_in[row], want.out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_keeps_the_dtype_of_the_state(dtype):
    arrays, _ = make(2, "channel")
    result = jax.eval_shape(scan(2), **{**arrays, "state": jnp.asarray(arrays["state"], dtype)})
    assert result.dtype == dtype


def test_under_vmap_remat_and_scan():
    arrays, cotangent = make(4, "channel")

    def local(state, decay, initial_state):
        # [layers, H, K, V]: heads mapped, rematerialised, layers scanned.
        one = jax.checkpoint(jax.vmap(lambda s, d, i: zeco_jax.all_scan(s, d, "seq", blocks=3, initial_state=i)))
        return jax.lax.scan(lambda _, layer: (None, one(*layer)), None, (state, decay, initial_state))[1]

    layers = {name: np.stack([x, 0.5 * x], 0 if name == "initial_state" else 1) for name, x in arrays.items()}
    layers["initial_state"] = np.stack([layers["initial_state"]] * 4)
    run = jax.jit(per_rank(local, 4))
    result, pullback = jax.vjp(lambda layers: run(*(layers[name] for name in arrays)), layers)
    gradients = pullback(jnp.stack([cotangent, cotangent], 1))[0]
    for layer, factor in enumerate((1.0, 0.5)):
        scaled = {name: factor * x for name, x in arrays.items()}
        want = oracle.all_scan(**scaled, dstate_in=cotangent)
        agreement.assert_agrees("state_in", result[:, layer], want.out)
        agreement.assert_agrees("dstate", gradients["state"][:, layer], want.gradients["state"])
        agreement.assert_agrees("ddecay", gradients["decay"][:, layer], want.gradients["decay"])


PROPERTY_RANKS = 5
PROPERTY_SCAN = {}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    decays=st.lists(
        st.one_of(st.sampled_from([0.0, 1.0, 1e-30]), st.floats(0.0, 1.0, width=32)),
        min_size=PROPERTY_RANKS * HEADS,
        max_size=PROPERTY_RANKS * HEADS,
    ),
    seed=st.integers(0, 2**32 - 1),
    reverse=st.booleans(),
)
def test_any_decays(decays, seed, reverse):
    arrays, _ = make(PROPERTY_RANKS, "head", seed)
    arrays["decay"] = np.asarray(decays, np.float32).reshape(PROPERTY_RANKS, HEADS)
    run = PROPERTY_SCAN.setdefault(reverse, scan(PROPERTY_RANKS, blocks=4, reverse=reverse))
    want = oracle.all_scan(**arrays, reverse=reverse)
    agreement.assert_agrees("state_in", run(**arrays), want.out)


def bytes_sent(records, ranks: int) -> list[int]:
    """What each rank puts on the wire over all permutes."""
    sent = [0] * ranks
    for record in records:
        assert record.kind == "collective-permute", record
        for source, _ in record.pairs:
            sent[source] += record.bytes
    return sent


@pytest.mark.parametrize("blocks", [1, 3, ROWS])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_each_rank_sends_one_state_and_the_last_none(ranks, reverse, blocks):
    arrays, _ = make(ranks, "channel")
    compiled = scan(ranks, blocks=blocks, reverse=reverse).lower(**arrays).compile()
    records = collectives_in(compiled.as_text())
    state_bytes = arrays["state"][0].nbytes
    expected = [state_bytes] * (ranks - 1) + [0]
    assert bytes_sent(records, ranks) == (expected[::-1] if reverse else expected)
    assert len(records) == ranks - 2 + blocks
    step = -1 if reverse else 1
    assert all(target == source + step for record in records for source, target in record.pairs)


def test_one_rank_sends_nothing():
    arrays, _ = make(1, "channel")
    compiled = jax.jit(jax.grad(lambda arrays: scan(1)(**arrays).sum())).lower(arrays).compile()
    assert collectives_in(compiled.as_text()) == []


def test_gradient_is_one_exchange_in_the_other_direction():
    ranks = 4
    arrays, cotangent = make(ranks, "channel")
    del arrays["initial_state"]

    def gradient(arrays, cotangent):
        return jax.vjp(lambda arrays: scan(ranks, blocks=2)(**arrays), arrays)[1](cotangent)

    records = collectives_in(jax.jit(gradient).lower(arrays, cotangent).compile().as_text())
    forward = [record for record in records if all(target > source for source, target in record.pairs)]
    backward = [record for record in records if all(target < source for source, target in record.pairs)]
    assert len(forward) == len(backward) == len(records) / 2 == ranks - 2 + 2
    state_bytes = arrays["state"][0].nbytes
    assert bytes_sent(forward, ranks) == [state_bytes] * (ranks - 1) + [0]
    assert bytes_sent(backward, ranks) == [0] + [state_bytes] * (ranks - 1)


STATE = np.ones((HEADS, KEYS, VALUES), np.float32)
DECAY = np.ones((HEADS, KEYS), np.float32)


MISTAKES = [
    wrong("state", STATE.astype(np.int32)),
    wrong("state", STATE[0, 0]),
    wrong("decay", np.ones((HEADS, KEYS + 1), np.float32)),
    wrong("decay", np.ones((HEADS, KEYS, VALUES), np.float32)),
    wrong("decay", np.ones((), np.float32)),
    wrong("decay", np.ones((HEADS, KEYS), np.int32)),
    wrong("initial_state", STATE[:, :1]),
    wrong("initial_state", STATE.astype(np.int32)),
    wrong("schedule", "teleport"),
    wrong("schedule", None),
    wrong("blocks", 0),
    wrong("blocks", -1),
    wrong("blocks", 1.5),
    wrong("blocks", "2"),
    wrong("axis_name", "nowhere"),
    wrong("axis_name", ("seq", "nowhere")),
    wrong("axis_name", 3),
    wrong("axis_name", None),
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named(mistake):
    arguments = {"state": STATE, "decay": DECAY, "axis_name": "seq", mistake.argument: mistake.value}
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    options = {name: value for name, value in arguments.items() if name not in arrays}
    run = per_rank(lambda arrays: zeco_jax.all_scan(**arrays, **options), 2)
    with pytest.raises((ValueError, TypeError), match=mistake.pattern) as caught:
        run({name: np.stack([array] * 2) for name, array in arrays.items()})
    mistake.check(caught.value)


def test_outside_shard_map():
    with pytest.raises(ValueError, match="axis_name"):
        zeco_jax.all_scan(STATE, DECAY, "seq")
