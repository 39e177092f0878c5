"""Softmax attention on global arrays: the same operator, owning its shard_map."""

from functools import partial

import jax
from jax.sharding import Mesh, PartitionSpec

from zeco_jax.attention.softmax import check_softmax_inputs
from zeco_jax.parallel.sharded import check_cuts, run_cut
from zeco_jax.parallel.sharding import MeshAxes, SequenceSharding
from zeco_jax.parallel.softmax_attention import softmax_attention


def sharded_softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mesh: Mesh,
    batch: MeshAxes = None,
    seq: MeshAxes = "seq",
    heads: MeshAxes = None,
    scale: float | None = None,
    segment_ids: jax.Array | None = None,
    strategy: str = "ring",
    backend: str | None = None,
) -> jax.Array:
    r"""Causal softmax attention of a sequence that is cut over the devices of a mesh, on global arrays.

    .. math:: o_i = \sum_{j \le i} \frac{e^{s_{ij}}}{\sum_{j' \le i} e^{s_{ij'}}} v_j, \qquad
        s_{ij} = \text{scale} \cdot q_i k_j^\top

    The arrays are whole, and this function cuts them, runs `softmax_attention` in a `jax.shard_map` of its own and lays
    the result out the same way. Works with and without `jax.jit`, for meshes with Auto and with Explicit axes.

    Args:
        q: [B, T, H, K] floating point.
        k: [B, T, G, K]; G divides H, query head h uses key head h // (H / G).
        v: [B, T, G, V].
        mesh: the devices.
        batch: mesh axis (or tuple of axes) that cuts B; None leaves it whole.
        seq: mesh axis (or tuple of axes, slowest first) that cuts T.
        heads: mesh axis that cuts H and G; None leaves them whole.
        scale: factor on the scores, `K ** -0.5` if None.
        segment_ids: [B, T] integers, packed documents: a token sees nothing from before a change of id.
        strategy: "ring", "ring-plain" or "ulysses", as in `softmax_attention`.
        backend: as in `softmax_attention`.

    Returns:
        [B, T, H, V] in v's dtype, cut as q is.

    Raises:
        ValueError: a dimension that the mesh axes don't divide, an axis that the mesh doesn't have, and whatever
            `softmax_attention` refuses.
        TypeError: arguments of the wrong type.
        NotImplementedError: the backend that was asked for can't serve the call; the message says why.

    References:
        DistFlashAttention, arXiv 2310.03294; DeepSpeed-Ulysses, arXiv 2309.14509.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import zeco_jax
        >>> mesh = jax.make_mesh((4,), ("seq",), devices=jax.devices()[:4])
        >>> q, v = jnp.zeros((1, 8, 2, 4)), 2 * jnp.arange(8.0).reshape(1, 8, 1, 1)
        >>> out = zeco_jax.sharded_softmax_attention(q, q[:, :, :1], v, mesh=mesh)
        >>> out[0, :, 0, 0].round().tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    check_softmax_inputs(q, k, v, scale=scale, segment_ids=segment_ids)
    sharding = SequenceSharding(mesh, batch, seq, heads)
    check_cuts(sharding, "q", q, "BTH")
    check_cuts(sharding, "k", k, "BTG")
    activations = PartitionSpec(batch, seq, heads)
    specs = dict.fromkeys("qkv", activations) | {"segment_ids": sharding.spec(2)}
    arrays = {"q": q, "k": k, "v": v, "segment_ids": segment_ids}
    operator = partial(softmax_attention, scale=scale, axis_name=seq, strategy=strategy, backend=backend)
    return run_cut(operator, arrays, specs, activations, sharding)
