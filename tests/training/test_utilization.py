import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.dependence import waiting_flops
from zeco_jax.models import ModelConfig, count_parameters, named_config
from zeco_jax.pods import chip_of
from zeco_jax.training import Skeleton, model_flops_per_token, model_flops_utilization

TOKENS = 512
MODEL = ModelConfig(
    vocabulary_size=256, hidden_size=128, num_layers=2, num_heads=2, mlp_multiple=64, backend="xla", chunk_size=64
)


def traced_flops_per_token(model: ModelConfig) -> float:
    """Of all matrix products in the gradient of the model's outputs."""
    skeleton = Skeleton(model)
    parameters = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: skeleton.initialize(0))
    )
    tokens = jnp.zeros((1, TOKENS), jnp.int32)
    gradient = jax.grad(lambda parameters: skeleton.assemble(parameters)(tokens).sum())
    return sum(waiting_flops(gradient, parameters)) / TOKENS


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="head-of-its-own"),
        pytest.param({"tie_embeddings": True}, id="tied-head"),
        pytest.param({"decay": "token"}, id="decay-per-token"),
        pytest.param({"decay": "none", "num_kv_heads": 1}, id="shared-keys"),
    ],
)
def test_counts_the_products_of_a_training_step(changes):
    model = dataclasses.replace(MODEL, **changes)
    # The backend computes whole squares of scores, of which the mask throws half away, and scores twice.
    assert 1 <= traced_flops_per_token(model) / model_flops_per_token(model) < 1.1


def test_is_6_per_parameter_and_attention():
    model = named_config("1b")
    embedding = model.vocabulary_size * model.hidden_size
    attention = 3 * 24 * 4 * (4 * 256 * 512 + 64 * (256 + 512))
    # Norms and biases don't multiply matrices.
    assert model_flops_per_token(model) == pytest.approx(
        6 * (count_parameters(model) - embedding) + attention, rel=1e-3
    )


@pytest.mark.parametrize(
    "changes", [{"remat": True}, {"chunk_size": 16}, {"dtype": "bfloat16"}, {"scan_unroll": 2}], ids=str
)
def test_does_not_depend_on_how_the_model_is_computed(changes):
    assert model_flops_per_token(dataclasses.replace(MODEL, **changes)) == model_flops_per_token(MODEL)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_peaks_are_dense(kind, peak):
    assert chip_of(kind).peak_flops == peak
    full = 2 * peak / model_flops_per_token(MODEL)
    assert model_flops_utilization(MODEL, full, devices=2, device_kind=kind) == pytest.approx(1.0)


def test_a_cpu_has_no_known_peak():
    assert model_flops_utilization(MODEL, 1e3, devices=1, device_kind="cpu") is None
