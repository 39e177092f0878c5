"""One block of the language model."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from zeco_jax.collectives import AxisName
from zeco_jax.layers import AttentionCache, GatedLinearAttention, SoftmaxAttention, SoftmaxCache, SwiGLU
from zeco_jax.layers.initializers import INITIAL_STDDEV, default_kernel_init
from zeco_jax.models.config import ModelConfig
from zeco_jax.parallel import SequenceSharding

LayerCache = AttentionCache | SoftmaxCache


class Block(nnx.Module):
    """Pre-norm block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Projections into the residual stream start smaller by the root of the number of them, so that its variance at the
    start doesn't grow with depth.

    Args:
        config: The model's configuration.
        kind: The attention: "linear" or "softmax".
        sharding: How global [B, T, D] arrays lie on a mesh.
        axis_name: Inside `jax.shard_map`, the mesh axis (or axes) along which T is sharded.
        rngs: Random streams; `params` is used.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: str = "linear",
        *,
        sharding: SequenceSharding | None = None,
        axis_name: AxisName | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        common = {
            "dtype": dtype,
            "kernel_init": default_kernel_init,
            "output_init": nnx.initializers.normal(INITIAL_STDDEV / math.sqrt(2 * config.num_layers)),
            "sharding": sharding,
            "rngs": rngs,
        }
        self.attention_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        if kind == "softmax":
            self.attention = SoftmaxAttention(
                config.hidden_size,
                config.softmax_heads or config.num_heads,
                num_kv_heads=config.softmax_kv_heads,
                rotary_base=config.rotary_base,
                axis_name=axis_name,
                strategy=config.softmax_strategy,
                backend=config.softmax_backend,
                **common,
            )
        else:
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
                axis_name=axis_name,
                schedule=config.schedule,
                backend=config.backend,
                chunk_size=config.chunk_size,
                **common,
            )
        self.mlp_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_size, block_tokens=config.mlp_block_tokens, **common)

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Applies the block to whole sequences `x` [B, T, D]."""
        x = x + self.attention(self.attention_norm(x), segment_ids)
        return x + self.mlp(self.mlp_norm(x))

    def init_cache(self, batch_size: int, capacity: int | None = None) -> LayerCache:
        """The cache of `batch_size` sequences that haven't begun, for `capacity` tokens where that matters."""
        if isinstance(self.attention, GatedLinearAttention):
            return self.attention.init_cache(batch_size)
        if capacity is None:
            raise ValueError("capacity must be given, got None: softmax layers keep the keys and values of all tokens")
        return self.attention.init_cache(batch_size, capacity)

    def prefill(
        self,
        x: jax.Array,
        cache: LayerCache,
        segment_ids: jax.Array | None = None,
        continues: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """Applies the block to the next stretch `x` [B, T, D] of sequences."""
        attended, cache = self.attention.prefill(self.attention_norm(x), cache, segment_ids, continues)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache

    def decode_step(self, x: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """Applies the block to one more token `x` [B, D] of sequences."""
        attended, cache = self.attention.decode_step(self.attention_norm(x), cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache
