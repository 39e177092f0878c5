"""Ulysses for softmax attention: heads instead of tokens over the ranks, by all-to-alls before and after it."""

import math

import jax
import jax.numpy as jnp

from zeco_jax.attention.softmax import check_softmax_inputs, softmax_attention
from zeco_jax.collectives import AxisName, axis_size
from zeco_jax.parallel.ulysses import to_heads, to_tokens


def ulysses_softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: AxisName,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    r"""Causal softmax attention over a sequence that is cut over the ranks, by sharing out the heads.

    .. math:: o_i = \sum_{j \le i} \frac{e^{s_{ij}}}{\sum_{j' \le i} e^{s_{ij'}}} v_j, \qquad
        s_{ij} = \text{scale} \cdot q_i k_j^\top

    All-to-alls bring each rank all T tokens of H / P query heads and of the key heads that those use; they are attended
    to on one device, and another all-to-all brings the outputs back. Key heads are sent r times where P doesn't divide
    them, r = P / gcd(P, G). Differentiable in q, k and v.

    Args:
        q: [B, T / P, H, K] floating point, this rank's part of the sequence, in rank order.
        k: [B, T / P, G, K]; G divides H, query head h uses key head h // (H / G).
        v: [B, T / P, G, V].
        axis_name: inside `jax.shard_map`: the mesh axis along which T is cut, or a tuple of axes, slowest first.
        scale: factor on the scores, `K ** -0.5` if None.
        segment_ids: [B, T / P] integers, packed documents: a token sees nothing from before a change of id, on
            whichever rank it falls.
        backend: as in `softmax_attention`.

    Returns:
        [B, T / P, H, V] in v's dtype.

    Raises:
        ValueError: a number of query heads that the ranks don't divide, shapes that don't match, an unknown backend, an
            axis that isn't in scope.
        TypeError: arguments of the wrong type.
        NotImplementedError: the backend that was asked for can't serve the call; the message says why.

    References:
        DeepSpeed-Ulysses, arXiv 2309.14509, section 3.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> from zeco_jax.parallel.ulysses_softmax import ulysses_softmax_attention
        >>> mesh = jax.make_mesh((4,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:4])
        >>> attend = jax.shard_map(lambda q, k, v: ulysses_softmax_attention(q, k, v, axis_name="seq"), mesh=mesh,
        ...                        in_specs=P(None, "seq"), out_specs=P(None, "seq"))
        >>> q, k = jnp.zeros((1, 8, 4, 1)), jnp.zeros((1, 8, 2, 1))
        >>> v = jnp.broadcast_to(jnp.arange(0.0, 16.0, 2.0)[None, :, None, None], k.shape)
        >>> attend(q, k, v)[0, :, 0, 0].tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    check_softmax_inputs(q, k, v, scale=scale, segment_ids=segment_ids)
    heads, key_heads, ranks = q.shape[2], k.shape[2], axis_size(axis_name)
    if heads % ranks:
        raise ValueError(
            f"q has H = {heads} heads, which the {ranks} ranks of axis_name={axis_name!r} don't divide; expected a "
            "multiple: ring_attention shares out tokens instead and takes any number of heads"
        )
    if segment_ids is not None:
        segment_ids = jax.lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
    # Whole key heads for every rank; since P divides H, those of its query heads.
    copies = ranks // math.gcd(ranks, key_heads)
    k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    q, k, v = (to_heads(x, axis_name) for x in (q, k, v))
    out = softmax_attention(q, k, v, scale=scale, segment_ids=segment_ids, backend=backend)
    return to_tokens(out, axis_name)
