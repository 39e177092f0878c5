"""The linear-attention language model."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from zeco_jax.collectives import AxisName
from zeco_jax.layers import AttentionCache
from zeco_jax.layers.initializers import default_kernel_init
from zeco_jax.layers.placement import by_batch, constrain, divides
from zeco_jax.models.block import Block
from zeco_jax.models.config import ModelConfig
from zeco_jax.models.vocabulary import last_token, look_up, to_logits
from zeco_jax.parallel import SequenceSharding


class LinearAttentionLM(nnx.Module):
    """A decoder-only language model on gated linear attention.

    Embedding, `config.num_layers` blocks of (RMSNorm, gated linear attention) and (RMSNorm, SwiGLU), RMSNorm, LM head.

    The blocks' parameters are stacked along a first axis of length `num_layers` and the blocks run as one
    `jax.lax.scan`: a block is compiled once, whatever the depth.

    With `sharding` the model runs under plain `jax.jit` on global arrays: attention and the short convolution go
    through `jax.shard_map`, XLA partitions the token-wise rest. Parameters are the same with and without it; they
    start as a copy on every device of the mesh.

    Args:
        config: Shape and options of the model.
        sharding: How global [B, T] tokens lie on a mesh; None: on one device.
        axis_name: For use inside your own `jax.shard_map`: the mesh axis (or axes) along which T is sharded.
        rngs: Random streams; `params` is used.

    Raises:
        ValueError: `sharding` and `axis_name` are both given.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from zeco_jax.models import LinearAttentionLM, ModelConfig
        >>> config = ModelConfig(vocabulary_size=11, hidden_size=16, num_layers=2, num_heads=2)
        >>> model = LinearAttentionLM(config, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 11)
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
        self.config = config
        self.sharding = sharding
        self.embedding = nnx.Embed(
            config.vocabulary_size, config.hidden_size, dtype=dtype, embedding_init=default_kernel_init, rngs=rngs
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def make_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, sharding=sharding, axis_name=axis_name, rngs=rngs)

        self.blocks = make_blocks(rngs)
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.head = nnx.data(None)
        if not config.tie_embeddings:
            self.head = nnx.Linear(
                config.hidden_size,
                config.vocabulary_size,
                use_bias=False,
                dtype=dtype,
                kernel_init=default_kernel_init,
                rngs=rngs,
            )
        if sharding is not None:
            nnx.update(self, jax.tree.map(lambda x: sharding.place(x, PartitionSpec()), nnx.state(self)))

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Logits of the next token at every position.

        Args:
            tokens: [B, T] integers.
            segment_ids: [B, T] integers, for packed documents: nothing crosses a change of id.

        Returns:
            [B, T, vocabulary] float32.
        """
        return self.logits(self.hidden(tokens, segment_ids))

    def hidden(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """What the LM head sees: the residual stream after the last norm.

        Args:
            tokens: [B, T] integers.
            segment_ids: [B, T] integers, for packed documents.

        Returns:
            [B, T, D] in the compute dtype.
        """
        _check_tokens(tokens, 2)
        x = constrain(self.sharding, look_up(self.embedding, constrain(self.sharding, tokens)))
        segment_ids = constrain(self.sharding, segment_ids)

        def apply(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return block(x, segment_ids), None

        x, _ = self._scan_blocks(apply, x, remat=self.config.remat)
        return self.norm(x)

    @property
    def head_kernel(self) -> jax.Array:
        """What turns hidden states into logits, [D, vocabulary] float32."""
        return self.embedding.embedding[...].T if self.head is None else self.head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The LM head: logits [..., vocabulary] float32 of `hidden` [..., D]."""
        return to_logits(hidden, self.head_kernel)

    def init_cache(self, batch_size: int) -> AttentionCache:
        """The cache of `batch_size` sequences that haven't begun: a layer's, stacked along a first axis."""
        one_layer = self.blocks.attention.init_cache(batch_size)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.config.num_layers, *x.shape)), one_layer)

    def prefill(self, tokens: jax.Array, cache: AttentionCache) -> tuple[jax.Array, AttentionCache]:
        """Reads the next stretch of sequences, in parallel over its tokens.

        Args:
            tokens: [B, T] integers. A stretch that `sharding` can't divide runs whole on every device.
            cache: What came before, from `init_cache` or the last call.

        Returns:
            The logits [B, vocabulary] after the last token, and the cache.
        """
        _check_tokens(tokens, 2)
        sharded = divides(self.sharding, tokens)
        tokens = constrain(self.sharding, tokens) if sharded else by_batch(self.sharding, tokens)
        x = look_up(self.embedding, tokens)
        x, cache = self._scan_blocks(Block.prefill, x, cache)
        return self.logits(last_token(self.norm(x))), cache

    def decode_step(self, token: jax.Array, cache: AttentionCache) -> tuple[jax.Array, AttentionCache]:
        """Reads one more token of each sequence.

        Args:
            token: [B] integers.
            cache: What came before.

        Returns:
            The logits [B, vocabulary] after it, and the cache.
        """
        _check_tokens(token, 1)
        x, cache = self._scan_blocks(Block.decode_step, look_up(self.embedding, by_batch(self.sharding, token)), cache)
        return self.logits(self.norm(x)), cache

    def _scan_blocks(
        self,
        apply: Callable[[Block, jax.Array, Any], tuple[jax.Array, Any]],
        x: jax.Array,
        per_layer: Any = None,
        remat: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Runs `x, y = apply(block, x, item)` over the blocks and the items of `per_layer`; returns x and all y."""
        definition, parameters = nnx.split(self.blocks)

        def step(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, Any]:
            parameters, item = layer
            return apply(nnx.merge(definition, parameters), x, item)

        if remat:
            # As long as forward and backward are two loops, nothing merges the computation with its repetition, and the
            # costly barrier against it isn't needed.
            loops = self.config.scan_unroll < self.config.num_layers
            # With the outputs and the entering states of attention at hand, attention itself needn't run again, nor its
            # exchange (DistFlashAttention, arXiv 2310.03294, section 3.3).
            policy = jax.checkpoint_policies.save_only_these_names("attention_out", "entering_state")
            step = jax.checkpoint(step, prevent_cse=not loops, policy=policy)
        return jax.lax.scan(step, x, (parameters, per_layer), unroll=self.config.scan_unroll)


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of the model, without making it.

    Example:
        >>> from zeco_jax.models import count_parameters, named_config
        >>> round(count_parameters(named_config("340m")) / 1e6)
        342
    """
    model = nnx.eval_shape(lambda: LinearAttentionLM(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _check_tokens(tokens: jax.Array, rank: int) -> None:
    if tokens.ndim != rank or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers with {rank} dimensions, got {tokens.dtype} of shape {tokens.shape}")
