"""The language-modelling loss."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class LossSum(NamedTuple):
    """A loss before its division, so that it can be added up over batches.

    Attributes:
        total: Sum of the losses of the tokens that count, in nats, float32 scalar.
        count: How many tokens count, float32 scalar.
    """

    total: jax.Array
    count: jax.Array

    @property
    def mean(self) -> jax.Array:
        """Loss per token in nats; 0 if no token counts."""
        return self.total / jnp.maximum(self.count, 1.0)


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> LossSum:
    """Cross entropy of the next token, summed in float32 over the tokens that count.

    `total = sum_bt mask_bt (log sum_v exp(logits_btv) - logits_bt,targets_bt)`

    Args:
        logits: [B, T, vocabulary], any float type.
        targets: [B, T] integers.
        mask: [B, T] bool, True where the target counts.

    Returns:
        The sum and the number of tokens.

    Example:
        >>> import jax.numpy as jnp
        >>> from zeco_jax.training import bits_per_byte, cross_entropy
        >>> loss = cross_entropy(jnp.zeros((1, 3, 256)), jnp.zeros((1, 3), int), jnp.array([[True, True, False]]))
        >>> int(loss.count), float(bits_per_byte(loss.mean))
        (2, 8.0)
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return LossSum(jnp.sum(losses, where=mask), jnp.sum(mask, dtype=jnp.float32))


def bits_per_byte(nats: jax.Array | float) -> jax.Array | float:
    """Turns a loss in nats per byte into bits per byte.

    Args:
        nats: Loss of a byte-level model, per byte.

    Returns:
        `nats / ln 2`, of the same kind.
    """
    return nats / math.log(2.0)
