"""How much of the devices' arithmetic a training step uses: model FLOPs, and their share of the peak."""

import math

import jax

from zeco_jax.layers.heads import head_width
from zeco_jax.models import ModelConfig
from zeco_jax.pods import chip_of
from zeco_jax.training.parameters import Skeleton

# Tokens per chunk that are counted, whatever chunks a backend takes: the count must not depend on what is measured.
_CHUNK = 64


def model_flops_per_token(model: ModelConfig, sequence_length: int | None = None) -> int:
    r"""Multiplications and additions that the model asks of a training step for each token.

    .. math:: 6 N + 3 L H (4 K V + C (K + V)) + 6 L_s T D, \qquad C = 64

    - N: the parameters that multiply, i.e. matrices and the taps of the short convolution. Each takes one
      multiplication and one addition forward and twice that backward. Tied or not, the LM head counts once and looking
      tokens up in the embedding doesn't count.
    - The rest is linear attention in chunks of C tokens, with L layers of H heads: 2KV for the token's part of the
      state, 2KV to read the state, and C/2 earlier tokens on average in the chunk, each 2K for a score and 2V for its
      value. Backward takes twice as much as forward.
    - A softmax layer, of which there are :math:`L_s`, takes the same of T/2 earlier tokens on average, with heads that
      are D wide together.

    What is computed again in the backward pass doesn't count, nor what backends compute beyond this. Chowdhery et al.,
    "PaLM" (arXiv 2204.02311), appendix B, with linear attention in the place of softmax attention.

    Args:
        model: The model's configuration.
        sequence_length: T, which matters with softmax layers only.

    Returns:
        Floating-point operations per token.

    Raises:
        ValueError: The model has softmax layers and there is no `sequence_length`.

    Example:
        >>> from zeco_jax.models import named_config
        >>> from zeco_jax.training import model_flops_per_token
        >>> f"{model_flops_per_token(named_config('1b')):.3g}"
        '7.96e+09'
    """
    softmax_layers = model.num_groups * model.layer_pattern.count("softmax")
    if softmax_layers and sequence_length is None:
        raise ValueError("sequence_length must be given, got None: the work of softmax layers grows with it")
    parameters = jax.eval_shape(lambda: Skeleton(model).initialize(0))
    head = "embedding/embedding" if model.tie_embeddings else None
    multiply = sum(
        math.prod(leaf.shape) for name, leaf in parameters.items() if name.endswith("/kernel") or name == head
    )
    key_width = head_width(model.hidden_size, model.expand_k, model.num_heads, "expand_k")
    value_width = head_width(model.hidden_size, model.expand_v, model.num_heads, "expand_v")
    attention = 4 * key_width * value_width + _CHUNK * (key_width + value_width)
    linear = 3 * (model.num_layers - softmax_layers) * model.num_heads * attention
    softmax = 6 * softmax_layers * (sequence_length or 0) * model.hidden_size
    return 6 * multiply + linear + softmax


def model_flops_utilization(
    model: ModelConfig,
    tokens_per_second: float,
    *,
    devices: int,
    device_kind: str,
    sequence_length: int | None = None,
) -> float | None:
    """The share of the devices' bfloat16 peak that goes into the model's own products (MFU).

    Model FLOPs per second over `devices * peak`; the peaks, dense, are those of `zeco_jax.pods.chip_of`. A model that
    computes in float32 is measured against the same peak.

    Args:
        model: The model's configuration.
        tokens_per_second: Training throughput of all devices together.
        devices: How many there are.
        device_kind: What JAX calls each of them.
        sequence_length: See `model_flops_per_token`.

    Returns:
        A share between 0 and 1, or None for devices whose peak isn't known, such as CPUs.

    Example:
        >>> from zeco_jax.models import named_config
        >>> from zeco_jax.training import model_flops_utilization
        >>> kind = "NVIDIA H100 80GB HBM3"
        >>> round(model_flops_utilization(named_config("1b"), 49_633, devices=1, device_kind=kind), 3)
        0.4
    """
    try:
        peak = chip_of(device_kind).peak_flops
    except ValueError:
        return None
    return model_flops_per_token(model, sequence_length) * tokens_per_second / (devices * peak)
