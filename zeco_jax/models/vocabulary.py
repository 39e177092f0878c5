"""From tokens to vectors and back."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from zeco_jax.collectives import AxisName, axis_index, axis_size
from zeco_jax.parallel import SequenceSharding


def look_up(embedding: nnx.Embed, tokens: jax.Array) -> jax.Array:
    """The vectors [..., D] of `tokens` [...], sharded like them."""
    sharding = jax.typeof(tokens).sharding
    if not any(sharding.spec):
        return embedding(tokens)
    # Explicit mesh axes: a gather has to be told where its result lies.
    return embedding(tokens, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, None)))


def to_logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """Logits `hidden @ kernel` in float32, however narrow the operands.

    The cotangent is rounded to the dtype of `hidden`, so that both products of the backward pass, over the whole
    vocabulary, run as fast as the one of the forward pass.

    Args:
        hidden: [..., D] floats.
        kernel: [D, vocabulary] floats; rounded to the dtype of `hidden`.

    Returns:
        [..., vocabulary] float32.
    """
    return _to_logits(hidden, kernel.astype(hidden.dtype))


@jax.custom_vjp
def _to_logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def _to_logits_forward(hidden: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _to_logits(hidden, kernel), (hidden, kernel)


def _to_logits_backward(operands: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, pull_back = jax.vjp(jnp.matmul, *operands)
    return pull_back(cotangent.astype(operands[0].dtype))


_to_logits.defvjp(_to_logits_forward, _to_logits_backward)


def first_and_last(
    segment_ids: jax.Array, sharding: SequenceSharding | None, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array]:
    """The ids [B] of the first and of the last token of `segment_ids` [B, T], on every rank along T."""
    if sharding is not None:
        ends = partial(first_and_last, sharding=None, axis_name=sharding.seq)
        by_batch = PartitionSpec(sharding.batch)
        return jax.shard_map(ends, mesh=sharding.mesh, in_specs=sharding.spec(2), out_specs=by_batch)(segment_ids)
    ends = segment_ids[:, 0], segment_ids[:, -1]
    if axis_name is None:
        return ends
    owners = 0, axis_size(axis_name) - 1
    own = [jnp.where(axis_index(axis_name) == owner, end, 0) for end, owner in zip(ends, owners, strict=True)]
    return tuple(jax.lax.psum(own, axis_name))


def last_token(x: jax.Array) -> jax.Array:
    """The last token [B, D] of `x` [B, T, D], whole on every rank along T."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x[:, -1]
    place = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0], sharding.spec[2]))
    # Explicit mesh axes don't let a sharded dimension be sliced unevenly; the compiler does.
    return jax.sharding.auto_axes(lambda x: x[:, -1], out_sharding=place)(x)
