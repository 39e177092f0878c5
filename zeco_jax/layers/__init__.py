"""Flax NNX modules: gated linear attention and what stands around it."""

from zeco_jax.layers.convolution import ShortConvolution, causal_convolution
from zeco_jax.layers.decay import DECAYS, DecayGate, retention_log_decay
from zeco_jax.layers.gated_linear_attention import AttentionCache, GatedLinearAttention
from zeco_jax.layers.mlp import SwiGLU

__all__ = [
    "DECAYS",
    "AttentionCache",
    "DecayGate",
    "GatedLinearAttention",
    "ShortConvolution",
    "SwiGLU",
    "causal_convolution",
    "retention_log_decay",
]
