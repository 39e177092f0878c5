"""How fast a head forgets: the kinds of decay, and the projection that makes it depend on the token."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from zeco_jax.layers.heads import split_heads
from zeco_jax.layers.initializers import default_kernel_init

Dtype = jax.typing.DTypeLike

DECAYS = ("channel", "token", "head", "none")


def retention_log_decay(num_heads: int) -> jax.Array:
    """The fixed decays of retention, `log(1 - 2**(-5 - h))` for head h: [H] float32.

    Sun et al., "Retentive Network" (arXiv 2307.08621), section 3.1.

    Example:
        >>> from zeco_jax.layers import retention_log_decay
        >>> [f"{log_decay:.4f}" for log_decay in retention_log_decay(2)]
        ['-0.0317', '-0.0157']
    """
    return jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(num_heads, dtype=jnp.float32)))


class DecayGate(nnx.Module):
    """The log decay of every token, `logsigmoid(projection(x)) / normalizer`, in float32.

    Yang et al., "Gated Linear Attention Transformers" (arXiv 2312.06635), section 4.4.

    Args:
        features: width D of the input.
        num_heads: heads H that decay on their own.
        key_width: key channels K per head.
        kind: "channel": one decay per token, head and key channel, from a projection of low rank; "token": one per
            token and head; "head": fixed, one per head (retention); "none": no decay.
        rank: rank of the projection for "channel".
        normalizer: divides the log decay, so that a state outlives more than a few tokens when training begins.
        dtype: compute dtype of the projection down to `rank`; everything after it is float32.
        kernel_init: initialiser of the projections.
        rngs: random streams; `params` is used.

    Raises:
        ValueError: `kind` is none of the four, `rank` is below 1 or `normalizer` isn't positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from zeco_jax.layers import DecayGate
        >>> gate = DecayGate(8, num_heads=2, key_width=4, rngs=nnx.Rngs(0))
        >>> gate(jnp.ones((1, 5, 8))).shape
        (1, 5, 2, 4)
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        key_width: int,
        *,
        kind: str = "channel",
        rank: int = 16,
        normalizer: float = 16.0,
        dtype: Dtype | None = None,
        kernel_init: nnx.Initializer = default_kernel_init,
        rngs: nnx.Rngs,
    ) -> None:
        if kind not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}; got {kind!r}")
        if rank < 1:
            raise ValueError(f"gate_rank must be at least 1, got {rank}")
        if not normalizer > 0:
            raise ValueError(f"gate_normalizer must be positive, got {normalizer}")
        if kind == "channel":
            self.down = nnx.Linear(features, rank, use_bias=False, dtype=dtype, kernel_init=kernel_init, rngs=rngs)
            self.up = nnx.Linear(rank, num_heads * key_width, dtype=jnp.float32, kernel_init=kernel_init, rngs=rngs)
        elif kind == "token":
            self.up = nnx.Linear(features, num_heads, dtype=jnp.float32, kernel_init=kernel_init, rngs=rngs)
        self.num_heads = num_heads
        self.key_width = key_width
        self.kind = kind
        self.normalizer = normalizer

    def __call__(self, x: jax.Array) -> jax.Array | None:
        """The log decay for `x` [B, T, D].

        Args:
            x: [..., D] floats.

        Returns:
            [..., H, K], [..., H], [H] or None, as `kind` says; float32, at most 0.
        """
        if self.kind == "none":
            return None
        if self.kind == "head":
            return retention_log_decay(self.num_heads)
        if self.kind == "token":
            return _log_decay(self.up(x), self.normalizer)
        # Split before the bias, so that all that follows the product is one pass over the gates.
        kernel, bias = (parameter[...].astype(jnp.float32) for parameter in (self.up.kernel, self.up.bias))
        logits = split_heads(self.down(x).astype(jnp.float32) @ kernel, self.num_heads)
        return _log_decay(logits + bias.reshape(logits.shape[-2:]), self.normalizer)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _log_decay(logits: jax.Array, normalizer: float) -> jax.Array:
    return jax.nn.log_sigmoid(logits) / normalizer


def _forward(logits: jax.Array, normalizer: float) -> tuple[jax.Array, jax.Array]:
    log_decay = _log_decay(logits, normalizer)
    # The result says all that the gradient needs; without packed documents attention keeps it anyway.
    return log_decay, log_decay


def _backward(normalizer: float, log_decay: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (-jnp.expm1(normalizer * log_decay) / normalizer * cotangent,)


_log_decay.defvjp(_forward, _backward)
