"""Packed documents, numbered along the sequence."""

import jax
import jax.numpy as jnp

from zeco_jax.attention.gates import document_starts


def documents_of(segment_ids: jax.Array) -> jax.Array:
    """The number of changes of id up to each token: an id that comes again is another document.

    Args:
        segment_ids: [B, T] integers.

    Returns:
        [B, T] int32, from 0 on.

    Example:
        >>> import jax.numpy as jnp
        >>> from zeco_jax.attention.softmax import documents_of
        >>> documents_of(jnp.array([[7, 7, 3, 7, 7]])).tolist()
        [[0, 0, 1, 2, 2]]
    """
    return jnp.cumsum(document_starts(segment_ids, segment_ids[:, :1]), axis=1, dtype=jnp.int32)
