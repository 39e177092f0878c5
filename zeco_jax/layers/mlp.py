"""The gated feed-forward layer."""

import jax
from flax import nnx

from zeco_jax.layers.initializers import default_kernel_init

Dtype = jax.typing.DTypeLike


class SwiGLU(nnx.Module):
    """Feed-forward layer with a gated SiLU: `down(silu(gate(x)) * up(x))`, without biases.

    Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202), section 2.

    Args:
        features: width D of the input and the output.
        hidden_features: width of the gated layer between.
        dtype: compute dtype; that of input and parameters together if not given. Parameters are float32.
        kernel_init: initialiser of the two projections into the layer.
        output_init: initialiser of the projection out of it; `kernel_init` if not given.
        rngs: random streams; `params` is used.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from zeco_jax.layers import SwiGLU
        >>> SwiGLU(8, 16, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 8))).shape
        (2, 5, 8)
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        dtype: Dtype | None = None,
        kernel_init: nnx.Initializer = default_kernel_init,
        output_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        def project(inputs: int, outputs: int, init: nnx.Initializer) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)

        self.gate = project(features, hidden_features, kernel_init)
        self.up = project(features, hidden_features, kernel_init)
        self.down = project(hidden_features, features, output_init or kernel_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to every token of `x` [..., D]; the result has the same shape."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))
