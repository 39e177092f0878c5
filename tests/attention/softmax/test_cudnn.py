"""The cuDNN backend: on a GPU; around a stand-in for the kernel; and as a program for GPUs that aren't here."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from tests.attention.softmax import cases
from tests.attention.softmax.contract import SoftmaxBackendContract
from tests.meshes import mesh
from zeco_jax.attention.softmax import CudnnSoftmaxBackend, cudnn, make_softmax_backend
from zeco_jax.platforms import DeviceKind

# Outputs in bfloat16 leave gradients too few digits where nearly all of a sum cancels.
CANCELLING = ("large_scores-packed", "two_tokens")
BFLOAT16 = tuple(replace(case, dtype="bfloat16") for case in cases.EVERY if case.name not in CANCELLING)


class CudnnContract(SoftmaxBackendContract):
    """Few enough queries in a call under a mask for several calls."""

    backend = CudnnSoftmaxBackend(masked_queries=16)
    covers = BFLOAT16
    split = replace(cases.GROUPED, dtype="bfloat16")


@pytest.mark.gpu
class TestOnGpu(CudnnContract):
    covers = (
        *BFLOAT16,
        replace(cases.GROUPED, name="wide", tokens=600, key_width=128, value_width=96, dtype="bfloat16"),
    )

    def test_is_chosen(self):
        x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
        assert isinstance(make_softmax_backend(None, x, x, x), CudnnSoftmaxBackend)


def kernel_scores(q, k, bias, scale, mask_type):
    """What cuDNN computes of operands that it takes, [B, H, T, S] in float32."""
    assert q.shape[-1] == k.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert q.dtype == k.dtype == jnp.bfloat16
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = scale * jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        assert bias.shape[2:] == scores.shape[2:]
        assert not any(size % 2 for size in bias.shape[2:])
        scores += bias.astype(jnp.float32)
    if mask_type is cudnn.fused.MaskType.CAUSAL:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -jnp.inf)
    return scores


def kernel_forward(q, k, v, bias, *, scale, mask_type, return_residual):
    """In the place of `dot_product_attention`."""
    assert return_residual
    assert v.shape == k.shape
    scores = kernel_scores(q, k, bias, scale, mask_type)
    log_sum_exp = jax.nn.logsumexp(scores, axis=-1)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2).astype(jnp.float32)
    return jnp.einsum("bhts,bshv->bthv", jnp.exp(scores - log_sum_exp[..., None]), v).astype(q.dtype), log_sum_exp


class KernelAdjoint:
    """In the place of the primitive of the gradient."""

    @staticmethod
    def bind(q, k, v, bias, *operands, scale, variadic_args, mask_type, **options):
        *unused, log_sum_exp, out, dout = operands
        assert {x.size for x in unused} == {0}
        assert variadic_args == (bias.size > 0, False)
        weights = jnp.exp(kernel_scores(q, k, bias if bias.size else None, scale, mask_type) - log_sum_exp[..., None])
        groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
        whole_k, whole_v = (jnp.repeat(x, repeats, axis=2).astype(jnp.float32) for x in (k, v))
        q, out, dout = (x.astype(jnp.float32) for x in (q, out, dout))
        delta = jnp.einsum("bthv,bthv->bht", out, dout)
        dscores = scale * weights * (jnp.einsum("bthv,bshv->bhts", dout, whole_v) - delta[..., None])
        dq = jnp.einsum("bhts,bshk->bthk", dscores, whole_k)
        dk, dv = (
            jnp.einsum("bhts,bthw->bshw", x, y).reshape(*k.shape[:2], groups, repeats, -1).sum(3)
            for x, y in ((dscores, q), (weights, dout))
        )
        return [x.astype(k.dtype) for x in (dq, dk, dv)]


class TestAroundTheKernel(CudnnContract):
    """What is filled up, cut into calls, masked and summed around the kernel."""

    @pytest.fixture(autouse=True)
    def _stand_in(self, monkeypatch):
        monkeypatch.setattr(cudnn.fused, "dot_product_attention", kernel_forward)
        monkeypatch.setattr(cudnn.fused, "_dot_product_attention_bwd_p_wrapper", KernelAdjoint)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_program_for_nvidia_gpus(monkeypatch, causal, packed):
    """JAX takes the calls, inside shard_map too: one each way, or one for each part of the queries under a mask."""
    monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)
    backend = CudnnSoftmaxBackend(masked_queries=64)

    def run(q, k, v, dout, documents):
        options = {"scale": 1.0, "causal": causal, "query_documents": documents, "key_documents": documents}
        out, log_sum_exp = backend.attend(q, k, v, **options)
        return backend.adjoint(q, k, v, out, log_sum_exp, dout, **options)

    spec = PartitionSpec("data")
    run = jax.jit(jax.shard_map(run, mesh=mesh(data=1), in_specs=spec, out_specs=spec))
    shapes = [((2, 129, 4, 64), "bfloat16"), *[((2, 129, 2, 64), "bfloat16")] * 2, ((2, 129, 4, 64), "bfloat16")]
    structs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    structs.append(jax.ShapeDtypeStruct((2, 129), "int32") if packed else None)
    text = run.trace(*structs).lower(lowering_platforms=("cuda",)).as_text()
    names = re.findall(r"__cudnn\$fmha(\w+)", text)
    assert names == (
        ["ScaleBiasSoftmax"] * 3 + ["ScaleBiasSoftmaxBackward"] * 3 if packed else ["Softmax", "SoftmaxBackward"]
    )
    masks = re.findall(r"mask_type\W*22: \W*22(\w+)\\", text)
    assert masks.count("CAUSAL") == 2 * causal


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        pytest.param((1, 8, 2, 64), "float32", "bfloat16 or float16, got float32", id="dtype"),
        pytest.param((1, 8, 2, 264), "bfloat16", "widths K and V up to 256 on this GPU, got 264", id="width"),
        pytest.param((1, 8, 2, 64), "bfloat16", "cuDNN is not detected", id="no_cudnn"),
    ],
)
def test_what_it_cannot_serve(monkeypatch, shape, dtype, reason):
    monkeypatch.setattr(cudnn, "platform_in_scope", lambda: DeviceKind("gpu", "NVIDIA H100").platform)
    if "cuDNN" not in reason:
        monkeypatch.setattr(cudnn.fused, "check_cudnn_version", lambda: 91000)
        monkeypatch.setattr(cudnn.fused, "check_compute_capability", lambda capability: True)
    x = jnp.zeros(shape, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        make_softmax_backend("cudnn", x, x, x)
