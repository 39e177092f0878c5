"""One stretch of tokens, all its chunks at once: summarize, and replay in the part without and the part with the state.

Arrays of a stretch lie as [N, B, H, C, *]: N chunks of C tokens, with the gates [N, B or 1, H, C, K or 1]. States are
[B, H, K, V]. Everything is in the accumulation dtype; matrix products round their operands to `operand_dtype`.
"""

import jax
import jax.numpy as jnp

from zeco_jax.attention.xla.contract import contract
from zeco_jax.attention.xla.decay_tree import DecayTree, decay_tree
from zeco_jax.attention.xla.scores import decayed_scores

# Turns of the loop over chunks that are compiled as one: a turn costs a few microseconds of launches on a GPU. On an
# H200, forward + backward of [1, 16384, 16, 128, 128] take 10.5 ms with 1, 8.4 with 4, 8.3 with 8 and with 16.
CHUNKS_AT_ONCE = 8


def cut_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """[B, N C, H, *] -> [N, B, H, C, *]."""
    batch, tokens, heads, width = x.shape
    return x.reshape(batch, tokens // chunk, chunk, heads, width).transpose(1, 0, 3, 2, 4)


def join_chunks(x: jax.Array) -> jax.Array:
    """[N, B, H, C, *] -> [B, N C, H, *]."""
    count, batch, heads, chunk, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, count * chunk, heads, width)


def stretch_summary(
    k: jax.Array, v: jax.Array, gates: jax.Array, operand_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the stretch's decay [B or 1, H, K or 1], and the state that it leaves from zero."""
    tree = decay_tree(gates)
    to_end = tree.from_token + _exclusive_sum(tree.total, reverse=True)[..., None, :]
    state = contract("nbhck,nbhcv->bhkv", k * jnp.exp(to_end), v, operand_dtype)
    return jnp.sum(tree.total, axis=0), state


def stretch_summary_adjoint(
    q: jax.Array, gates: jax.Array, dout: jax.Array, operand_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the stretch's decay, and the cotangent that the outputs put on the entering state."""
    tree = decay_tree(gates)
    from_start = tree.to_token + _exclusive_sum(tree.total, reverse=False)[..., None, :]
    dstate = contract("nbhck,nbhcv->bhkv", q * jnp.exp(from_start), dout, operand_dtype)
    return jnp.sum(tree.total, axis=0), dstate


def stretch_intra(
    q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, operand_dtype: jnp.dtype, tree: DecayTree | None = None
) -> jax.Array:
    """What the tokens of each chunk see of one another, [N, B, H, C, V]."""
    tree = decay_tree(gates) if tree is None else tree
    scores = decayed_scores(q, k, tree.levels, operand_dtype)
    return contract("...ij,...jv->...iv", scores, v, operand_dtype)


def stretch_inter(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    state_in: jax.Array,
    operand_dtype: jnp.dtype,
    tree: DecayTree | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What the tokens see of the chunks before theirs, [N, B, H, C, V], and the state that leaves."""
    tree = decay_tree(gates) if tree is None else tree
    state_out, entering = _pass_chunks(tree, _added_states(k, v, tree, operand_dtype), state_in)
    return _read_states(q, entering, tree, operand_dtype), state_out


def stretch_state_by_chunks(k: jax.Array, v: jax.Array, gates: jax.Array, operand_dtype: jnp.dtype) -> jax.Array:
    """The state that the stretch leaves from zero, through the very products that `stretch_inter` makes.

    For a stretch that is both summarized and replayed in one program: the compiler sees that the products are the same.
    """
    tree = decay_tree(gates)
    added = _added_states(k, v, tree, operand_dtype)
    return _pass_chunks(tree, added, jnp.zeros_like(added[0]))[0]


def stretch_state_adjoint_by_chunks(
    q: jax.Array, gates: jax.Array, dout: jax.Array, operand_dtype: jnp.dtype
) -> jax.Array:
    """The cotangent of the entering state, through the very products that the gradient of `stretch_inter` makes."""
    tree = decay_tree(gates)
    entering = jnp.zeros_like(jnp.swapaxes(q, -1, -2)[..., :1] * dout[..., :1, :])
    _, read_back = jax.vjp(lambda states: _read_states(q, states, tree, operand_dtype), entering)
    _, pass_back = jax.vjp(lambda state: _pass_chunks(tree, entering, state)[1], entering[0])
    return pass_back(*read_back(dout))[0]


def _added_states(k: jax.Array, v: jax.Array, tree: DecayTree, operand_dtype: jnp.dtype) -> jax.Array:
    """The states that each chunk leaves from zero, [N, B, H, K, V]."""
    return contract("...ck,...cv->...kv", k * jnp.exp(tree.from_token), v, operand_dtype)


def _pass_chunks(tree: DecayTree, added: jax.Array, state_in: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The state that leaves the last chunk, and those that enter each chunk, [N, B, H, K, V]."""

    def pass_chunk(state: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        decay, state_added = chunk
        return decay[..., None] * state + state_added, state

    return jax.lax.scan(pass_chunk, state_in, (jnp.exp(tree.total), added), unroll=CHUNKS_AT_ONCE)


def _read_states(q: jax.Array, entering: jax.Array, tree: DecayTree, operand_dtype: jnp.dtype) -> jax.Array:
    """What the queries of each chunk read from the state that enters it, [N, B, H, C, V]."""
    return contract("...ck,...kv->...cv", q * jnp.exp(tree.to_token), entering, operand_dtype)


def stretch_replay(
    q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, state_in: jax.Array, operand_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Both parts together: the outputs [N, B, H, C, V] and the state that leaves."""
    tree = decay_tree(gates)
    inter, state_out = stretch_inter(q, k, v, gates, state_in, operand_dtype, tree)
    return stretch_intra(q, k, v, gates, operand_dtype, tree) + inter, state_out


def _exclusive_sum(totals: jax.Array, *, reverse: bool) -> jax.Array:
    """Sums over the chunks before each one (after it with `reverse`), without subtracting."""
    zero = jnp.zeros_like(totals[:1])
    if totals.shape[0] == 1:
        return zero
    if reverse:
        return jnp.concatenate([jnp.cumsum(totals[:0:-1], axis=0)[::-1], zero])
    return jnp.concatenate([zero, jnp.cumsum(totals[:-1], axis=0)])
