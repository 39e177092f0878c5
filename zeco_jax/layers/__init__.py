"""Flax NNX modules: attention, linear and softmax, and what stands around it."""

from zeco_jax.layers.convolution import ShortConvolution, causal_convolution
from zeco_jax.layers.decay import DECAYS, DecayGate, retention_log_decay
from zeco_jax.layers.gated_linear_attention import AttentionCache, GatedLinearAttention
from zeco_jax.layers.mini_sequences import cut_tokens, mini_sequence_tokens
from zeco_jax.layers.mlp import SwiGLU
from zeco_jax.layers.rotary import rotary
from zeco_jax.layers.softmax_attention import SoftmaxAttention, SoftmaxCache

__all__ = [
    "DECAYS",
    "AttentionCache",
    "DecayGate",
    "GatedLinearAttention",
    "ShortConvolution",
    "SoftmaxAttention",
    "SoftmaxCache",
    "SwiGLU",
    "causal_convolution",
    "cut_tokens",
    "mini_sequence_tokens",
    "retention_log_decay",
    "rotary",
]
