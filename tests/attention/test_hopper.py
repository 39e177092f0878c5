"""The Hopper backend, simulated on the CPU and compiled on a GPU."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import zeco_jax
from tests.agreement import relative_rms
from tests.attention import cases
from tests.attention.contract import LinearAttentionContract
from tests.meshes import mesh
from zeco_jax.attention import Call, HopperBackend, attend, document_starts, make_backend
from zeco_jax.attention.hopper import levels, plan
from zeco_jax.attention.hopper.tile import FACTORED_LIMIT, WEAKEST_GATE
from zeco_jax.collectives import AllScanOptions
from zeco_jax.parallel import AllScanExchange

# Chunks that decay strongly are factored, too, before others take their place: infinities that nobody reads.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in (matmul|add):RuntimeWarning")


def attention(q, k, v, log_decay=None, *, scale=None, initial_state=None, segment_ids=None, interpret=False):
    """As `zeco_jax.linear_attention`, by a backend with options."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = HopperBackend(scale, interpret=interpret)
    starts = None if segment_ids is None else document_starts(segment_ids, segment_ids[:, :1])
    return attend(q, k, v, log_decay, backend=backend, initial_state=initial_state, starts=starts)


simulated = partial(attention, interpret=True)


def case(name, decay, regimes, tokens, *, batch=1, **options):
    return cases.Case(name, decay, regimes, tokens, batch=batch, dtype="bfloat16", **options)


class TestHopper(LinearAttentionContract):
    """Few and small: simulating a block of threads takes a second."""

    attend = staticmethod(simulated)
    covers = (
        case("channel-mild", "channel", ("gla",), 130, key_width=24, value_width=40),
        # Three heads of these widths are not paired.
        case("channel-strong-packed", "channel", ("mixed", "zero", "gla"), 70, segments="odd_places"),
        case("channel-one-by-two", "channel", ("mixed",), 70, value_width=136, segments="odd_places"),
        case("channel-two-by-one", "channel", ("gla",), 70, key_width=144),
        case("channel-two-by-three", "channel", ("mixed",), 70, key_width=144, value_width=264, segments="odd_places"),
        case("token-packed", "token", ("mixed", "gla", "near_one"), 70, segments="odd_places"),
        case("head", "head", ("near_one", "strong"), 64),
    )


class FewProcessors:
    """Short sequences are cut into stretches of one chunk each, so that the machine is full; here it is smaller."""

    processors: int

    @pytest.fixture(autouse=True)
    def _few_processors(self, monkeypatch):
        monkeypatch.setattr(plan, "MULTIPROCESSORS", self.processors)


class OneStretch(FewProcessors):
    processors = 1


class TestHopperInOneStretch(OneStretch, LinearAttentionContract):
    attend = staticmethod(simulated)
    covers = (
        case("channel-chunks", "channel", ("sometimes_zero",), 190),
        case("channel-chunks-two-by-three", "channel", ("sometimes_zero",), 190, key_width=144, value_width=264),
        # The first chunk decays weakly, a later one doesn't: what is known of a stretch must count all of its chunks.
        case("channel-late", "channel", ("gla",), 190, segments="late"),
        case("channel-late-two-by-one", "channel", ("gla",), 190, key_width=144, segments="late"),
        case("token-chunks", "token", ("gla",), 190),
        # Two heads in a tile, one of which decays strongly.
        case("channel-chunks-paired", "channel", ("sometimes_zero", "gla"), 190, key_width=40, value_width=64),
        case("channel-late-paired", "channel", ("gla", "gla"), 190, key_width=64, segments="late"),
        case("token-chunks-paired", "token", ("mixed", "gla"), 190, key_width=64, value_width=24),
        case("token-chunks-two-by-two", "token", ("gla",), 190, key_width=144, value_width=136, segments="odd_places"),
    )


class TestHopperInTwoStretches(FewProcessors, LinearAttentionContract):
    """Of two chunks and of one."""

    # Two blocks of threads for each stretch.
    processors = 4
    attend = staticmethod(simulated)
    # A length of their own, as what was traced for another machine isn't traced again.
    covers = tuple(
        case(f"{decay}-chunks-{name}", decay, regimes, 180, key_width=key_width, value_width=value_width)
        for name, key_width, value_width in (("two-by-two", 144, 136), ("narrow", 128, 72), ("paired", 64, 40))
        for decay, regime in (("channel", "sometimes_zero"), ("token", "gla"))
        for regimes in ((regime, "gla") if name == "paired" else (regime,),)
    )


def in_bfloat16(case):
    options = {name: value for name, value in case.options.items() if name != "chunk_size"}
    return dataclasses.replace(case, dtype="bfloat16", options=options)


@pytest.mark.gpu
class TestHopperOnGpu(LinearAttentionContract):
    attend = staticmethod(partial(zeco_jax.linear_attention, backend="hopper"))
    covers = tuple({case.name: in_bfloat16(case) for case in cases.EVERY}.values())


@pytest.mark.gpu
class TestHopperInOneStretchOnGpu(OneStretch, LinearAttentionContract):
    attend = staticmethod(partial(zeco_jax.linear_attention, backend="hopper"))
    covers = (
        tuple(
            # Several sequences: a token's gate has a gradient of some 20,000 products that add up to little by chance.
            case(f"{decay}-chunks-{key_width}-{value_width}", decay, cases.EVERY_REGIME, 320, batch=4, **widths)
            for decay in ("channel", "token")
            for key_width, value_width in ((128, 128), (128, 256), (256, 128), (256, 512))
            for widths in ({"key_width": key_width, "value_width": value_width},)
        )
        + tuple(
            # An even number of heads that are so narrow is paired.
            case(
                f"{decay}-chunks-64-64", decay, (*cases.EVERY_REGIME, "gla"), 320, batch=4, key_width=64, value_width=64
            )
            for decay in ("channel", "token")
        )
        + tuple(
            case(f"channel-late-{width}", "channel", regimes, 320, key_width=width, segments="late")
            for width, regimes in ((64, ("gla", "gla")), (128, ("gla",)), (256, ("gla",)))
        )
    )


class TestServing:
    def call(self, dtype="bfloat16", key_width=64, value_width=64):
        return Call(jnp.dtype(dtype), key_width, value_width)

    @pytest.mark.parametrize(
        ("options", "call", "reason"),
        [
            ({}, {"dtype": "float32"}, "bfloat16 queries, keys and values, not float32"),
            ({}, {"key_width": 300}, "at most 256 key and 512 value channels, not 300 and 64"),
            ({"chunk_size": 32}, {}, "chunks of 64 tokens, not 32"),
        ],
        ids=["float32", "wide", "chunk_size"],
    )
    def test_says_what_it_cannot_serve(self, options, call, reason):
        with pytest.raises(NotImplementedError, match=reason):
            HopperBackend(**options, interpret=True).check(self.call(**call))

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
    def test_needs_a_gpu(self):
        with pytest.raises(NotImplementedError, match=r"'hopper' can't serve .* H100 and H200 GPUs, not cpu"):
            make_backend("hopper", self.call())

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
    def test_another_backend_takes_over_and_the_reason_is_logged(self, caplog):
        with caplog.at_level("INFO", logger="zeco_jax.attention.choice"):
            backend = make_backend(None, self.call())
        assert type(backend).__name__ == "XlaBackend"
        assert "'hopper' can't serve this call" in caplog.text


class TestLevels:
    tokens = np.arange(64)

    def parted(self, level):
        codes = (code(self.tokens, jnp.int32(level)) for code in (levels.later, levels.earlier))
        return np.equal.outer(*map(np.asarray, codes))

    def reached(self, level):
        half, later = (np.asarray(x)[:, None] for x in levels.reach(self.tokens, jnp.int32(level)))
        gates_half = np.asarray(levels.half(self.tokens, jnp.int32(level)))
        return (half == gates_half) & ((np.subtract.outer(self.tokens, self.tokens) ^ later) >= 0)

    def test_every_pair_parts_once(self):
        parted = sum(self.parted(level).astype(int) for level in range(levels.LEVELS))
        np.testing.assert_array_equal(parted, np.tri(64))

    def test_gates_between_two_tokens_are_counted_once(self):
        gates = np.random.default_rng(0).normal(size=64)
        sums = np.cumsum(gates)
        for level in range(levels.LEVELS):
            decays = self.reached(level) @ gates
            got = (decays[:, None] + decays[None, :])[self.parted(level)]
            np.testing.assert_allclose(got, (sums[:, None] - sums[None, :])[self.parted(level)], atol=1e-12)


def test_stretches_fill_the_machine_and_do_not_outnumber_the_chunks():
    assert plan.stretches(16, 256) == 8
    assert plan.stretches(1, 3) == 3
    assert plan.stretches(1000, 100) == 1


def test_the_part_that_needs_no_state_can_be_done_before():
    backend = HopperBackend(interpret=True)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 70, 1, width)), jnp.bfloat16) for width in (64, 64, 264))
    gates = jnp.asarray(-rng.uniform(size=q.shape), jnp.float32)
    state = jnp.asarray(rng.normal(size=(1, 1, 64, 264)), jnp.float32)
    out, _ = jax.jit(backend.replay)(q, k, v, gates, state)

    @jax.jit
    def in_two(q, k, v, gates, state):
        prepared = backend.prepare(k, v, gates)
        intra = backend.replay_intra(q, k, v, gates, prepared=prepared)
        return backend.replay_inter(q, k, v, gates, state, intra, prepared=prepared)

    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (out, in_two(q, k, v, gates, state))))


@pytest.mark.parametrize(("heads", "key_width", "value_width"), [(2, 64, 64), (1, 128, 128), (1, 128, 256)])
def test_what_meets_the_state_is_rounded(monkeypatch, heads, key_width, value_width):
    """To the nearest bfloat16 number: cut off, queries alone would make the outputs 0.5 % wrong."""
    monkeypatch.setattr(plan, "MULTIPROCESSORS", 1)
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, 320, heads, width)), jnp.bfloat16)
        for width in (key_width, key_width, value_width)
    )
    gates = jnp.asarray(np.log1p(-1e-4 * rng.uniform(size=q.shape)), jnp.float32)
    state = jnp.asarray(rng.normal(size=(1, heads, key_width, value_width)), jnp.float32)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    want, _ = zeco_jax.linear_attention(*wide, gates, initial_state=state, backend="xla")
    got, _ = simulated(q, k, v, gates, initial_state=state)
    assert relative_rms(got, want) < 3.5e-3


@pytest.mark.parametrize("decay", ["channel", "token"])
def test_paired_heads_are_independent(decay):
    """What one of two heads that share a tile is given changes nothing of the other's results."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 128, 2, 64)), jnp.bfloat16) for _ in range(3))
    gates = jnp.asarray(-rng.uniform(size=q.shape if decay == "channel" else q.shape[:3]), jnp.float32)
    arguments = (q, k, v, gates)
    others = (*(x.at[:, :, 1].set(3 * x[:, :, 1]) for x in (q, k, v)), gates.at[:, :, 1].set(-90))
    (out, state), pull = jax.vjp(simulated, *arguments)
    (other_out, other_state), other_pull = jax.vjp(simulated, *others)
    np.testing.assert_array_equal(out[:, :, 0], other_out[:, :, 0])
    np.testing.assert_array_equal(state[:, 0], other_state[:, 0])
    cotangents = jnp.ones_like(out), jnp.ones_like(state)
    for name, x, y in zip(("q", "k", "v", "log_decay"), pull(cotangents), other_pull(cotangents), strict=True):
        np.testing.assert_array_equal(x[:, :, 0], y[:, :, 0], err_msg=name)


def gradients(attend, *arguments):
    (out, state), pull = jax.vjp(attend, *arguments)
    return pull((jnp.ones_like(out), jnp.ones_like(state)))


def test_decays_at_the_limit_of_what_is_factored(monkeypatch):
    """Where sums that are rounded in two ways fall on either side of it, nobody may mistake one for the other."""
    monkeypatch.setattr(plan, "MULTIPROCESSORS", 1)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 128, 1, 128)), jnp.bfloat16) for _ in range(3))
    gates = np.full((1, 128, 1, 128), -0.01)
    first = rng.uniform(size=(64, 128))
    gates[0, :64, 0] = FACTORED_LIMIT * first / first.sum(0)
    arguments = (q, k, v, jnp.asarray(gates, jnp.float32))

    want = gradients(partial(zeco_jax.linear_attention, backend="xla"), *(x.astype(jnp.float32) for x in arguments))
    for name, got, wanted in zip(("q", "k", "v", "log_decay"), gradients(simulated, *arguments), want, strict=True):
        assert relative_rms(got, wanted) < 5e-3, name


@pytest.mark.parametrize("width", [80, 128])
def test_documents_beside_strong_gates(monkeypatch, width):
    """Cuts at both ends of a chunk, in a row, and of some channels only; gates that are strong without being cuts."""
    monkeypatch.setattr(plan, "MULTIPROCESSORS", 1)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 192, 1, width)), jnp.bfloat16) for _ in range(3))
    gates = -0.05 * rng.uniform(size=(1, 192, 1, width))
    gates[0, [0, 7, 8, 63, 64, 100, 101, 127]] = -np.inf
    gates[0, 20:30, :, : width // 2] = WEAKEST_GATE
    gates[0, 140:150] = -np.inf
    gates[0, 160, :, ::2] = -np.inf
    gates[0, 170:180] *= 400
    assert_gradients_agree(q, k, v, jnp.asarray(gates, jnp.float32))


@pytest.mark.parametrize(("heads", "width"), [pytest.param(1, 72, id="narrow"), pytest.param(2, 64, id="paired")])
def test_runs_of_weak_and_strong_chunks(monkeypatch, heads, width):
    monkeypatch.setattr(plan, "MULTIPROCESSORS", 1)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 320, heads, width)), jnp.bfloat16) for _ in range(3))
    gates = -0.05 * rng.uniform(size=(1, 320, heads, width))
    for strong in (1, 2, 4):
        # In one head.
        gates[0, strong * 64 : (strong + 1) * 64, 0] *= 100
    assert_gradients_agree(q, k, v, jnp.asarray(gates, jnp.float32))


def assert_gradients_agree(*arguments):
    want = gradients(partial(zeco_jax.linear_attention, backend="xla"), *(x.astype(jnp.float32) for x in arguments))
    for name, got, wanted in zip(("q", "k", "v", "log_decay"), gradients(simulated, *arguments), want, strict=True):
        assert relative_rms(got, wanted) < 5e-3, name


@pytest.mark.parametrize(
    ("heads", "width"),
    [pytest.param(1, 128, id="narrow"), pytest.param(2, 64, id="paired"), pytest.param(1, 144, id="wide")],
)
@pytest.mark.parametrize("decay_width", [pytest.param(None, id="channel"), pytest.param(1, id="token")])
def test_summary_of_several_stretches(monkeypatch, heads, width, decay_width):
    """Two stretches of two chunks and of one."""
    monkeypatch.setattr(plan, "MULTIPROCESSORS", 2)
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(1, 170, heads, width)), jnp.bfloat16) for _ in range(2))
    gates = jnp.asarray(-0.02 * rng.uniform(size=(1, 170, heads, decay_width or width)), jnp.float32)
    got = HopperBackend(interpret=True).summarize(k, v, gates)
    want = make_backend("reference", Call.of(k, k, v)).summarize(*(x.astype(jnp.float32) for x in (k, v)), gates)
    assert relative_rms(got.decay, want.decay) < 1e-5
    assert relative_rms(got.state, want.state) < 5e-3


def test_rematerialization_summarizes_nothing_again():
    """Summaries and outputs are kept: backward the replay runs again for the chunks' states, and nothing else."""
    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_summaries")

    @partial(jax.checkpoint, policy=policy)
    def loss(q, k, v, log_decay):
        out, _ = attend(q, k, v, log_decay, backend=HopperBackend())
        return jnp.sum(out.astype(jnp.float32))

    arrays = [jax.ShapeDtypeStruct((1, 1024, 1, 128), dtype) for dtype in 3 * [jnp.bfloat16] + [jnp.float32]]
    with_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    lowered = with_gradients.trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 6


@pytest.mark.parametrize(
    ("heads", "width", "kernels"),
    [
        # Summaries once forward and once backward, however many parts need them; the replay, which keeps the states of
        # the chunks; their cotangents; gradients.
        pytest.param(1, 128, 5, id="narrow"),
        pytest.param(2, 64, 5, id="paired"),
        # Keys decayed, the stretches' states, what needs no state (twice: strong chunks are on their own), outputs; the
        # same once more in reverse, with the values' gradients instead of the outputs; the chunks' states; the other
        # gradients.
        pytest.param(1, 512, 12, id="wide"),
    ],
)
@pytest.mark.parametrize("check_vma", [True, False])
def test_lowers_over_ranks(check_vma, heads, width, kernels):
    """The kernels next to an exchange; the simulator knows no meshes, so only lowered."""
    exchange = AllScanExchange(AllScanOptions("seq", "chain"))
    spec = PartitionSpec(None, "seq")

    def local(q, v, log_decay):
        return attend(q, q, v, log_decay, backend=HopperBackend(), exchange=exchange)[0]

    def loss(q, v, log_decay):
        ranks = jax.shard_map(local, mesh=mesh(seq=2), in_specs=3 * (spec,), out_specs=spec, check_vma=check_vma)
        return jnp.sum(ranks(q, v, log_decay).astype(jnp.float32))

    q, v = (jax.ShapeDtypeStruct((1, 256, heads, n), jnp.bfloat16) for n in (min(128, width), width))
    log_decay = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    with_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    lowered = with_gradients.trace(q, v, log_decay).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == kernels
