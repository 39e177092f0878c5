"""Mini-sequences (MsT): token-wise work goes block by block, so that no more numbers exist than a block has."""

import jax
import jax.numpy as jnp

# Matrix products of whole tiles.
_TILE = 128
# Of bfloat16: the compiler fills up the operands of products that have another length, each in a pass of its own.
_ALIGNED = 16


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

    References:
        MsT, arXiv 2407.15892, section 3.

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
    """Cuts tokens into blocks of equal length, of which the last is filled up with zeros.

    Where there are several that may have 128 tokens or more, their length is a multiple of 16, which products want.

    Args:
        x: [N, ...], N at least 1.
        block_tokens: tokens of a block at most.

    Returns:
        [blocks, length, ...].

    Raises:
        ValueError: no tokens, or blocks of less than one.

    References:
        MsT, arXiv 2407.15892, section 3.

    Example:
        >>> import jax.numpy as jnp
        >>> from zeco_jax.layers import cut_tokens
        >>> cut_tokens(jnp.arange(1, 8), block_tokens=5).tolist()
        [[1, 2, 3, 4], [5, 6, 7, 0]]
        >>> cut_tokens(jnp.zeros(8192), block_tokens=3968).shape
        (3, 2736)
    """
    tokens = x.shape[0]
    if tokens < 1:
        raise ValueError(f"x must have at least one token, got shape {x.shape}")
    if block_tokens < 1:
        raise ValueError(f"block_tokens must be at least 1, got {block_tokens}")
    unit = _ALIGNED if _TILE <= block_tokens < tokens else 1
    units = -(-tokens // unit)
    length = -(-units // -(-units // (block_tokens // unit))) * unit
    blocks = -(-tokens // length)
    padded = jnp.pad(x, ((0, blocks * length - tokens),) + ((0, 0),) * (x.ndim - 1))
    return padded.reshape(blocks, length, *x.shape[1:])
