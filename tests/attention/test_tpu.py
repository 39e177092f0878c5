"""The TPU backend, simulated on the CPU."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from tests import agreement, oracle
from tests.attention import cases
from tests.attention.contract import LinearAttentionContract
from tests.meshes import mesh
from zeco_jax.attention import Call, attend, document_starts
from zeco_jax.attention.tpu import TpuBackend
from zeco_jax.attention.tpu.generations import GENERATIONS, SMALLEST, Generation, generation_of
from zeco_jax.attention.tpu.tiling import choose_tiling
from zeco_jax.collectives import AllScanOptions
from zeco_jax.parallel import AllScanExchange

# Memory that nobody wrote is NaN. Twice as slow as the plain interpreter.
SIMULATED = pltpu.InterpretParams(uninitialized_memory="nan")


def linear_attention(
    q,
    k,
    v,
    log_decay=None,
    *,
    scale=None,
    initial_state=None,
    segment_ids=None,
    exchange=None,
    interpret=True,
    heads_per_step=1,
    **options,
):
    """As `zeco_jax.linear_attention`; one head in a step, as compiling takes its time for each."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = TpuBackend(scale=scale, heads_per_step=heads_per_step, interpret=interpret, **options)
    starts = None if segment_ids is None else document_starts(segment_ids, segment_ids[:, :1])
    return attend(q, k, v, log_decay, backend=backend, exchange=exchange, initial_state=initial_state, starts=starts)


# Chunks that are mild in all of their gates take another way than those with a strong one.
MILD = (
    cases.Case("mild-bf16", "channel", ("near_one", "gla"), 257, key_width=24, value_width=40, dtype="bfloat16"),
    cases.Case("mild-packed-bf16", "channel", ("one", "gla"), 300, dtype="bfloat16", segments="odd_places"),
)


class TestTpu(LinearAttentionContract):
    attend = staticmethod(linear_attention)
    covers = tuple(case for case in cases.EVERY if case not in cases.ESSENTIAL)


class TestTpuWithPoisonedMemory(LinearAttentionContract):
    attend = staticmethod(partial(linear_attention, interpret=SIMULATED))
    covers = cases.ESSENTIAL + MILD


@pytest.mark.parametrize("sum_of_gates", [-40.0, -50.0])
def test_chunks_about_as_strong_as_the_mild_way_can_take(sum_of_gates):
    case = cases.Case("limit", regimes=("gla",), batch=1, tokens=128, key_width=24, value_width=40, dtype="bfloat16")
    arrays = cases.arrays(case)
    gates = np.random.default_rng(0).uniform(size=arrays.differentiable["log_decay"].shape).astype(np.float32)
    arrays.differentiable["log_decay"] = sum_of_gates * jnp.asarray(gates / gates.sum(axis=1, keepdims=True))
    test = TestTpu()
    result = test.compiled(case)(arrays.differentiable, None, arrays.dout, arrays.dfinal)
    test.assert_agrees(case, arrays, result)


@pytest.mark.parametrize("heads_per_step", [3, 4, 8])
def test_any_number_of_heads_in_a_step(heads_per_step):
    case = cases.Case("heads", "token", ("near_one", "gla", "mixed") * 2, tokens=20, value_width=8)
    arrays = cases.arrays(case)
    out, final_state = jax.jit(partial(linear_attention, heads_per_step=heads_per_step))(**arrays.differentiable)
    want = oracle.recurrence(**arrays.differentiable)
    agreement.assert_agrees("out", out, want.out)
    agreement.assert_agrees("final_state", final_state, want.final_state)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_over_ranks(decay):
    """Two ranks under check_vma, every gradient: the kernels next to an exchange."""
    case = cases.Case("ranks", decay, ("near_one", "gla"), batch=1, tokens=64, value_width=8)
    arrays = cases.arrays(case, ranks=2)
    exchange = AllScanExchange(AllScanOptions("seq", "chain"))
    spec = PartitionSpec(None, "seq")
    specs = dict.fromkeys(("q", "k", "v"), spec) | {
        "log_decay": PartitionSpec() if decay == "head" else spec,
        "initial_state": PartitionSpec(),
    }

    def local(arguments):
        # The plain interpreter doesn't know of varying axes.
        return linear_attention(**arguments, exchange=exchange, interpret=SIMULATED)[0]

    def loss(arguments, dout):
        out = jax.shard_map(local, mesh=mesh(seq=2), in_specs=(specs,), out_specs=spec)(arguments)
        return jnp.sum(out * dout), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(arrays.differentiable, arrays.dout)
    want = oracle.recurrence(**arrays.differentiable, dout=arrays.dout)
    agreement.assert_agrees("out", out, want.out)
    for name, gradient in gradients.items():
        agreement.assert_agrees(f"d{name}", gradient, want.gradients[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_nan_in_a_gate_is_not_hidden(decay, dtype):
    case = cases.Case("nan", decay, ("gla", "gla"), tokens=20, dtype=dtype)
    arrays = cases.arrays(case).differentiable
    poisoned = {**arrays, "log_decay": arrays["log_decay"].at[0, 10, 0].set(np.nan)}
    out, final_state = jax.jit(linear_attention)(**poisoned)
    assert np.isnan(out[0, 10:, 0]).all()
    assert np.isnan(final_state[0, 0]).all()
    assert np.isfinite(out[1].astype(np.float32)).all()


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_negative_and_zero_scale(decay):
    case = cases.Case("scale", decay, ("gla",), batch=1, tokens=20, value_width=8)
    arrays = cases.arrays(case).differentiable
    for scale in (-0.5, 0.0):
        out, _ = jax.jit(partial(linear_attention, scale=scale))(**arrays)
        agreement.assert_agrees("out", out, oracle.recurrence(**arrays, scale=scale).out)


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        pytest.param(Call(jnp.dtype("float64"), 128, 128), "bfloat16 or float32.*float64", id="float64"),
        pytest.param(Call(jnp.dtype("float16"), 128, 128), "bfloat16 or float32.*float16", id="float16"),
        pytest.param(Call(jnp.dtype("float32"), 4096, 4096), "K = 4096, V = 4096 .* MiB of VMEM", id="large-state"),
    ],
)
def test_says_what_it_cannot_serve(call, pattern):
    with pytest.raises(NotImplementedError, match=pattern):
        TpuBackend(interpret=True).check(call)


def test_needs_a_tpu_unless_simulated():
    call = Call(jnp.dtype("bfloat16"), 128, 128)
    TpuBackend(interpret=True).check(call)
    with pytest.raises(NotImplementedError, match=re.escape("need a TPU, this is cpu (cpu)")):
        TpuBackend().check(call)
    arrays = cases.arrays(cases.Case("platform", "none", tokens=20)).differentiable
    with pytest.raises(NotImplementedError, match="need a TPU"):
        linear_attention(**arrays, interpret=False)


@pytest.mark.parametrize("kind", GENERATIONS)
def test_generations_are_those_of_pallas(kind):
    versions = pltpu.ChipVersion
    version = {
        "TPU v4": versions.TPU_V4,
        "TPU v5 lite": versions.TPU_V5E,
        "TPU v5e": versions.TPU_V5E,
        "TPU v5": versions.TPU_V5P,
        "TPU v5p": versions.TPU_V5P,
        "TPU v6 lite": versions.TPU_V6E,
        "TPU v6e": versions.TPU_V6E,
        "TPU7x": versions.TPU_7X,
    }[kind]
    information = pltpu.get_tpu_info_for_chip(version, 1)
    cores = 2 if version.supports_megacore else 1
    assert GENERATIONS[kind] == (information.vmem_capacity_bytes, information.mxu_column_size, cores)


def test_unknown_generation():
    with pytest.raises(NotImplementedError, match="'TPU v99' has, only TPU v4"):
        generation_of("TPU v99")


def tiling_of(tokens=4096, heads=16, *, channel=True, chunk_size=None, generation=SMALLEST):
    options = {"channel": channel, "chunk_size": chunk_size, "heads_per_step": None, "generation": generation}
    return choose_tiling((1, tokens, heads, 128), 128, dtype=jnp.dtype("bfloat16"), **options)


@pytest.mark.parametrize(("vmem_mib", "heads"), [(5, 1), (8, 2), (16, 4), (128, 8)])
def test_takes_as_many_heads_as_fit(vmem_mib, heads):
    tiling = tiling_of(generation=Generation(vmem_mib * 2**20, 128))
    assert tiling.vmem_bytes <= 0.75 * vmem_mib * 2**20
    assert tiling.heads_per_step == heads


@pytest.mark.parametrize(("heads", "per_step"), [(16, 8), (12, 6), (7, 7), (5, 5), (11, 1)])
def test_heads_per_step_divide_the_heads(heads, per_step):
    assert tiling_of(heads=heads, generation=Generation(2**27, 128)).heads_per_step == per_step


@pytest.mark.parametrize(("heads", "per_step"), [(16, 8), (8, 4), (4, 2), (3, 3), (1, 1)])
def test_two_cores_share_the_heads_where_they_can(heads, per_step):
    assert tiling_of(heads=heads, generation=Generation(2**27, 128, cores=2)).heads_per_step == per_step


@pytest.mark.parametrize(
    ("asked", "tokens", "matrix_unit", "chunk"),
    [
        pytest.param(None, 4096, 128, 128, id="v5e"),
        pytest.param(None, 4096, 256, 256, id="v6e"),
        pytest.param(None, 3, 128, 16, id="few-tokens"),
        pytest.param(64, 4096, 128, 64, id="as-asked"),
        pytest.param(1, 4096, 128, 16, id="too-short"),
        pytest.param(1024, 4096, 128, 256, id="too-long"),
    ],
)
def test_chunk_size(asked, tokens, matrix_unit, chunk):
    generation = Generation(128 * 2**20, matrix_unit)
    assert tiling_of(tokens, chunk_size=asked, generation=generation).chunk == chunk
