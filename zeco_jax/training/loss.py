"""The language-modelling loss."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from zeco_jax.layers import cut_tokens, mini_sequence_tokens
from zeco_jax.models import to_logits
from zeco_jax.parallel import SequenceSharding
from zeco_jax.varying import match_varying, zeros_varying

# Of logits at a time. Every block reads and writes the kernel's whole gradient, so blocks of thousands of tokens run
# faster than blocks of hundreds; they should still take little beside the rest.
_LEAST_BYTES, _MOST_BYTES, _SHARE = 128 << 20, 512 << 20, 8

_Block = tuple[jax.Array, jax.Array, jax.Array]


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
        targets: [B, T] integers, from 0 to vocabulary - 1 where the mask counts them.
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


def cross_entropy_of_hidden(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    sharding: SequenceSharding | None = None,
    block_tokens: int | None = None,
) -> LossSum:
    """`cross_entropy` of the logits `hidden @ kernel`, of which only a block of tokens exists at a time.

    The logits of one token are as many as the vocabulary holds, fifteen times a hidden state of the 1b model: of 32K
    tokens they take 4 GiB, and their gradient as much. Here each rank goes through its own tokens block by block (the
    mini-sequences of MsT, arXiv 2407.15892, section 3). Where gradients are asked for, they are computed with the loss,
    while a block's logits are at hand: MsT computes these a second time. The kernel's gradient is summed over blocks in
    float32 and over ranks once.

    Args:
        hidden: [B, T, D] floats, what the LM head sees.
        kernel: [D, vocabulary] float32.
        targets: [B, T] integers, from 0 to vocabulary - 1 where the mask counts them.
        mask: [B, T] bool, True where the target counts.
        sharding: how [B, T, ...] lies on a mesh; None: on one device.
        block_tokens: tokens at a time on each device; None: an eighth of them, but as many as have 128 MiB of logits,
            and no more than have 512 MiB.

    Returns:
        The sum and the number of tokens.

    Raises:
        ValueError: `block_tokens` below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from zeco_jax.training import cross_entropy, cross_entropy_of_hidden
        >>> hidden, kernel, targets = jnp.ones((1, 5, 2)), jnp.eye(2, 7), jnp.arange(5)[None]
        >>> whole = cross_entropy(hidden @ kernel, targets, targets > 0)
        >>> blocks = cross_entropy_of_hidden(hidden, kernel, targets, targets > 0, block_tokens=2)
        >>> float(abs(blocks.total - whole.total)) < 1e-6
        True
    """
    if block_tokens is not None and block_tokens < 1:
        raise ValueError(f"block_tokens must be at least 1, got {block_tokens}")
    if sharding is None:
        return _sum_of_blocks(hidden, kernel, targets, mask, block_tokens)
    axes = tuple(jax.tree.leaves(tuple(sharding.spec(2))))

    def of_rank(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, mask: jax.Array) -> LossSum:
        own = _sum_of_blocks(hidden, kernel, targets, mask, block_tokens)
        return jax.tree.map(lambda x: jax.lax.psum(x, axes), own)

    whole = PartitionSpec()
    specs = (sharding.spec(3), whole, sharding.spec(2), sharding.spec(2))
    arrays = [sharding.place(x, spec) for x, spec in zip((hidden, kernel, targets, mask), specs, strict=True)]
    return jax.shard_map(of_rank, mesh=sharding.mesh, in_specs=specs, out_specs=LossSum(whole, whole))(*arrays)


def _sum_of_blocks(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, mask: jax.Array, block_tokens: int | None
) -> LossSum:
    """The loss of this device's tokens."""
    # Cast here, so that the ranks' gradients are summed in float32, and after the walk over blocks, not in every block.
    hidden, kernel, targets, mask = match_varying([hidden, kernel, targets, mask])
    most = block_tokens or _default_block_tokens(targets.size, kernel.shape[1])
    if targets.size <= most:
        return cross_entropy(to_logits(hidden, kernel), targets, mask)

    # What fills the last block up has a mask of False.
    hidden, targets, mask = (cut_tokens(x.reshape(targets.size, *x.shape[2:]), most) for x in (hidden, targets, mask))
    return LossSum(_total(hidden, kernel, targets, mask), jnp.sum(mask, dtype=jnp.float32))


@jax.custom_vjp
def _total(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """The loss of blocks of tokens, hidden [blocks, tokens, D]."""

    def step(total: jax.Array, block: _Block) -> tuple[jax.Array, None]:
        hidden, targets, mask = block
        return total + cross_entropy(to_logits(hidden, kernel), targets, mask).total, None

    return jax.lax.scan(step, zeros_varying((), jnp.float32, hidden), (hidden, targets, mask))[0]


def _total_and_gradients(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss, and its gradients with respect to `hidden` and `kernel`."""
    narrow = kernel.astype(hidden.dtype)

    def step(sums: tuple[jax.Array, jax.Array], block: _Block) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, dkernel = sums
        hidden, targets, mask = block
        logits = to_logits(hidden, narrow)
        total += cross_entropy(logits, targets, mask).total
        errors = jax.nn.softmax(logits) - jax.nn.one_hot(targets, logits.shape[-1])
        # Rounded like the operands, so that products over the whole vocabulary run as fast as the one for the logits.
        errors = jnp.where(mask[:, None], errors, 0.0).astype(hidden.dtype)
        dkernel += jnp.matmul(hidden.T, errors, preferred_element_type=dkernel.dtype)
        return (total, dkernel), errors @ narrow.T

    sums = tuple(
        zeros_varying(shape, dtype, hidden) for shape, dtype in (((), jnp.float32), (kernel.shape, kernel.dtype))
    )
    (total, dkernel), dhidden = jax.lax.scan(step, sums, (hidden, targets, mask))
    return total, (dhidden, dkernel)


def _scaled(gradients: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array | None, ...]:
    dhidden, dkernel = ((gradient * cotangent).astype(gradient.dtype) for gradient in gradients)
    return dhidden, dkernel, None, None


_total.defvjp(_total_and_gradients, _scaled)


def _default_block_tokens(tokens: int, vocabulary: int) -> int:
    share = 4 * tokens * vocabulary // _SHARE
    return mini_sequence_tokens(vocabulary, 4, min(max(share, _LEAST_BYTES), _MOST_BYTES))


def bits_per_byte(nats: jax.Array | float) -> jax.Array | float:
    """Turns a loss in nats per byte into bits per byte.

    Args:
        nats: Loss of a byte-level model, per byte.

    Returns:
        `nats / ln 2`, of the same kind.
    """
    return nats / math.log(2.0)
