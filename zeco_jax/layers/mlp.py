"""The gated feed-forward layer."""

import functools
import math

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from zeco_jax.layers.initializers import default_kernel_init
from zeco_jax.layers.mini_sequences import cut_tokens
from zeco_jax.layers.placement import divides
from zeco_jax.parallel import SequenceSharding
from zeco_jax.varying import cast_varying, varying_axes

Dtype = jax.typing.DTypeLike


class SwiGLU(nnx.Module):
    """Feed-forward layer with a gated SiLU: `down(silu(gate(x)) * up(x))`, without biases.

    Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202), section 2.

    With `block_tokens` the layer goes through its tokens in blocks, forward and again backward, where a block is
    computed a second time: of the two wide arrays and their product only a block exists (the mini-sequences of MsT,
    arXiv 2407.15892, section 3). Blocks differ in length by nothing but zeros at the end of the last, which no result
    sees. The parameters' gradients are summed over blocks in float32 and over ranks once.

    Args:
        features: width D of the input and the output.
        hidden_features: width of the gated layer between.
        block_tokens: tokens of a block at most; None: all at once.
        sharding: how global [B, T, D] arrays lie on a mesh; each rank's blocks are then blocks of its own tokens.
            Needed with `block_tokens` only, and not inside your own `jax.shard_map`.
        dtype: compute dtype; that of input and parameters together if not given. Parameters are float32.
        kernel_init: initialiser of the two projections into the layer.
        output_init: initialiser of the projection out of it; `kernel_init` if not given.
        rngs: random streams; `params` is used.

    Raises:
        ValueError: `block_tokens` below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from zeco_jax.layers import SwiGLU
        >>> SwiGLU(8, 16, block_tokens=4, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 8))).shape
        (2, 5, 8)
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        block_tokens: int | None = None,
        sharding: SequenceSharding | None = None,
        dtype: Dtype | None = None,
        kernel_init: nnx.Initializer = default_kernel_init,
        output_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        def project(inputs: int, outputs: int, init: nnx.Initializer) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)

        if block_tokens is not None and block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, got {block_tokens}")
        self.block_tokens = block_tokens
        self.sharding = sharding
        self.gate = project(features, hidden_features, kernel_init)
        self.up = project(features, hidden_features, kernel_init)
        self.down = project(hidden_features, features, output_init or kernel_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to every token of `x` [..., D]; the result has the same shape."""
        sharding = self.sharding
        if self.block_tokens is None or (sharding is not None and not divides(sharding, x)):
            # What a mesh can't cut is a few tokens, whole on every device.
            return self._project(x)
        ranks = 1 if sharding is None else sharding.size(sharding.batch) * sharding.size(sharding.seq)
        if math.prod(x.shape[:-1]) <= self.block_tokens * ranks:
            return self._project(x)
        definition, parameters = nnx.split(self)
        in_blocks = functools.partial(_in_blocks, definition, self.block_tokens)
        if sharding is None:
            return in_blocks(parameters, x)
        specs = PartitionSpec(), sharding.spec(3)
        on_ranks = jax.shard_map(in_blocks, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec(3))
        return on_ranks(parameters, sharding.constrain(x))

    def _project(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


def _in_blocks(definition: nnx.GraphDef[SwiGLU], block_tokens: int, parameters: nnx.State, x: jax.Array) -> jax.Array:
    """The layer on this device's tokens `x` [..., D], one block after the other."""
    # Before the walk over blocks, so that the ranks' gradients are summed after it, not in every block.
    parameters = jax.tree.map(lambda leaf: cast_varying(leaf, varying_axes(x)), parameters)

    @jax.checkpoint
    def of_block(parameters: nnx.State, block: jax.Array) -> jax.Array:
        return nnx.merge(definition, parameters)._project(block)

    flat = x.reshape(-1, x.shape[-1])
    blocks = jax.lax.map(lambda block: of_block(parameters, block), cut_tokens(flat, block_tokens))
    return blocks.reshape(-1, x.shape[-1])[: flat.shape[0]].reshape(x.shape)
