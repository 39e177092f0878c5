"""Mini-sequences: token-wise work goes block by block, so that no more numbers exist than a block has.

Mini-Sequence Transformer, MsT (arXiv 2407.15892), section 3.
"""

import jax
import jax.numpy as jnp

# Matrix products of whole tiles.
_TILE = 128


def mini_sequence_tokens(width: int, bytes_per_number: int, target_bytes: int) -> int:
    """How many tokens' intermediates fit into a target; from 128 tokens on, a multiple of 128.

    Args:
        width: intermediate numbers of one token.
        bytes_per_number: of each of them.
        target_bytes: memory that a block may take.

    Returns:
        At least 1.

    Raises:
        ValueError: an argument below 1.

    Example:
        >>> from zeco_jax.layers import mini_sequence_tokens
        >>> mini_sequence_tokens(128_000, 4, 128 << 20)  # logits of a large vocabulary
        256
    """
    for name, value in {"width": width, "bytes_per_number": bytes_per_number, "target_bytes": target_bytes}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    tokens = max(1, target_bytes // (width * bytes_per_number))
    return tokens // _TILE * _TILE if tokens >= _TILE else tokens


def cut_tokens(x: jax.Array, block_tokens: int) -> jax.Array:
    """Cuts tokens into blocks of about equal length, of which the last is filled up with zeros.

    Args:
        x: [N, ...].
        block_tokens: tokens of a block at most.

    Returns:
        [blocks, length, ...].
    """
    tokens = x.shape[0]
    blocks = -(-tokens // block_tokens)
    length = -(-tokens // blocks)
    padded = jnp.pad(x, ((0, blocks * length - tokens),) + ((0, 0),) * (x.ndim - 1))
    return padded.reshape(blocks, length, *x.shape[1:])
