"""One block of the language model."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from zeco_jax.collectives import AxisName
from zeco_jax.layers import AttentionCache, GatedLinearAttention, SwiGLU
from zeco_jax.layers.initializers import INITIAL_STDDEV, default_kernel_init
from zeco_jax.models.config import ModelConfig
from zeco_jax.parallel import SequenceSharding


class Block(nnx.Module):
    """Pre-norm block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Projections into the residual stream start smaller by the root of the number of them, so that its variance at the
    start doesn't grow with depth.

    Args:
        config: The model's configuration.
        sharding: How global [B, T, D] arrays lie on a mesh.
        axis_name: Inside `jax.shard_map`, the mesh axis (or axes) along which T is sharded.
        rngs: Random streams; `params` is used.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        sharding: SequenceSharding | None = None,
        axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        inits = {
            "kernel_init": default_kernel_init,
            "output_init": nnx.initializers.normal(INITIAL_STDDEV / math.sqrt(2 * config.num_layers)),
        }
        self.attention_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.attention = GatedLinearAttention(
            config.hidden_size,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            expand_k=config.expand_k,
            expand_v=config.expand_v,
            decay=config.decay,
            gate_rank=config.gate_rank,
            gate_normalizer=config.gate_normalizer,
            conv_width=config.conv_width,
            norm_eps=config.norm_eps,
            sharding=sharding,
            axis_name=axis_name,
            schedule=config.schedule,
            backend=config.backend,
            chunk_size=config.chunk_size,
            dtype=dtype,
            rngs=rngs,
            **inits,
        )
        self.mlp_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size, dtype=dtype, rngs=rngs, **inits)

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Applies the block to whole sequences `x` [B, T, D]."""
        x = x + self.attention(self.attention_norm(x), segment_ids)
        return x + self.mlp(self.mlp_norm(x))

    def prefill(self, x: jax.Array, cache: AttentionCache) -> tuple[jax.Array, AttentionCache]:
        """Applies the block to the next stretch `x` [B, T, D] of sequences."""
        attended, cache = self.attention.prefill(self.attention_norm(x), cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache

    def decode_step(self, x: jax.Array, cache: AttentionCache) -> tuple[jax.Array, AttentionCache]:
        """Applies the block to one more token `x` [B, D] of sequences."""
        attended, cache = self.attention.decode_step(self.attention_norm(x), cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache
