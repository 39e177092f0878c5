"""Decays of one gate per token and key channel, of any strength: a binary tree of blocks."""

from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from zeco_jax.attention.tpu.channel_decay import ChannelDecay
from zeco_jax.attention.tpu.products import product
from zeco_jax.attention.tpu.running_sums import SUBLANES


class Pairs(NamedTuple):
    """The tokens of a chunk as neighbouring pairs of blocks; half of the tokens lie in a left block of a pair.

    Small blocks are not taken out: there all functions keep all rows, and those of the other side mean nothing.

    Attributes:
        size: tokens per block, a power of two.
        chunk: tokens, a larger power of two.
    """

    size: int
    chunk: int

    @property
    def whole_tiles(self) -> bool:
        """Whether blocks are large enough to be taken out."""
        return self.size >= SUBLANES

    def is_right(self, width: int) -> jax.Array:
        """[C, width]: whether the row lies in a right block; for small blocks, which make every tile alike."""
        tile = jax.lax.broadcasted_iota(jnp.int32, (1, SUBLANES, width), 1) & self.size
        return jnp.broadcast_to(tile, (self.chunk // SUBLANES, SUBLANES, width)).reshape(self.chunk, width) != 0

    def take(self, x: jax.Array, side: int) -> jax.Array:
        """The rows on one side (0 left, 1 right), [C / 2, width]; all of them where blocks are small."""
        if not self.whole_tiles:
            return x
        return self._blocks(x)[:, side].reshape(self.chunk // 2, x.shape[1])

    def join(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """Puts the rows of both sides back, [C, width]."""
        width = left.shape[1]
        if not self.whole_tiles:
            return jnp.where(self.is_right(width), right, left)
        sides = [x.reshape(self.chunk // (2 * self.size), 1, self.size, width) for x in (left, right)]
        return jnp.concatenate(sides, axis=1).reshape(self.chunk, width)

    def sibling(self, x: jax.Array) -> jax.Array:
        """For each row the one at the same place of the pair's other block; for small blocks."""
        before, behind = pltpu.roll(x, self.size, 0), pltpu.roll(x, self.chunk - self.size, 0)
        return jnp.where(self.is_right(x.shape[1]), before, behind)

    def _blocks(self, x: jax.Array) -> jax.Array:
        return x.reshape(self.chunk // (2 * self.size), 2, self.size, x.shape[1])


class Level(NamedTuple):
    """Decays between the two blocks of pairs.

    Attributes:
        pairs: the blocks.
        to_right: from the start of the right block to each of its tokens, inclusive, <= 1.
        from_left: from after each of the left block's tokens to its end, <= 1.
    """

    pairs: Pairs
    to_right: jax.Array
    from_left: jax.Array


class TreeDecay(ChannelDecay):
    r"""The decays of one chunk of one head, with :math:`b_i` the sum of gates up to token i.

    The decay from token j to a later token i is that from j to the end of its block and from there to i, in the pair of
    blocks where they are on different sides. Both exponents are sums of gates and never differences, so both factors
    are at most 1 and accurate at any strength of decay.
    """

    @cached_property
    def _tree(self) -> tuple[tuple[Level, ...], jax.Array, jax.Array]:
        """All levels, the smallest blocks first, and the sums of gates to each token and after it."""
        chunk, width = self._gates.shape
        to_token, from_token, total = self._gates, jnp.zeros_like(self._gates), self._gates
        levels, size = [], 1
        while size < chunk:
            pairs = Pairs(size, chunk)
            if pairs.whole_tiles:
                to_left, to_right = pairs.take(to_token, 0), pairs.take(to_token, 1)
                from_left, from_right = pairs.take(from_token, 0), pairs.take(from_token, 1)
                if size == SUBLANES:
                    total = total.reshape(chunk // size, size, width)[:, :1]
                totals = total.reshape(chunk // (2 * size), 2, 1, width)
                left, right = (self._spread(totals[:, side], size) for side in range(2))
                levels.append(Level(pairs, jnp.exp2(to_right), jnp.exp2(from_left)))
                to_token = pairs.join(to_left, to_right + left)
                from_token = pairs.join(from_left + right, from_right)
                total = totals[:, 0] + totals[:, 1]
            else:
                is_right = pairs.is_right(width)
                to_border = jnp.exp2(jnp.where(is_right, to_token, from_token))
                levels.append(Level(pairs, to_border, to_border))
                other = pairs.sibling(total)
                to_token = jnp.where(is_right, to_token + other, to_token)
                from_token = jnp.where(is_right, from_token, from_token + other)
                total = total + other
            size *= 2
        return tuple(levels), to_token, from_token

    @property
    def _levels(self) -> tuple[Level, ...]:
        return self._tree[0]

    @cached_property
    def _to_token(self) -> jax.Array:
        return jnp.exp2(self._tree[1])

    @cached_property
    def _from_token(self) -> jax.Array:
        return jnp.exp2(self._tree[2])

    def _spread(self, totals: jax.Array, size: int) -> jax.Array:
        """[blocks, 1, K] -> [blocks size, K]."""
        blocks, _, width = totals.shape
        return jnp.broadcast_to(totals, (blocks, size, width)).reshape(blocks * size, width)

    def outputs(self, q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array) -> jax.Array:
        """The outputs [C, V], from the state that enters."""
        q, k = self._scaled(q), k.astype(jnp.float32)
        intra = product(self._scores(q, k), v, (1, 0), self._operand_dtype)
        return intra + product(q * self._to_token, state, (1, 1), self._operand_dtype)

    def adjoint(
        self, q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, state: jax.Array, dstate: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The gradients of what the chunk computes; see `TokenDecay.adjoint`. That of the gates is [C, K]."""
        dtype, chunk, width = self._operand_dtype, self._chunk, q.shape[1]
        q, k = self._scaled(q), k.astype(jnp.float32)
        dscores, dscores_transposed = product(dout, v, (1, 1), dtype), product(v, dout, (1, 1), dtype)
        distance, distance_transposed = _distance(chunk), _distance(chunk, transposed=True)

        on_diagonal = jnp.sum(jnp.where(self._on_diagonal, dscores, 0.0), axis=1, keepdims=True)
        through_state_q = self._to_token * product(dout, state, (1, 0), dtype)
        through_state_k = self._from_token * product(v, dstate, (1, 0), dtype)
        dq = on_diagonal * k + through_state_q
        dk = on_diagonal * q + through_state_k
        scores_transposed = jnp.where(self._on_diagonal, jnp.sum(q * k, axis=1, keepdims=True), 0.0)

        # Cotangents of the tree's sums, from the largest blocks down.
        dto, dfrom = q * through_state_q, k * through_state_k
        dsum = jnp.sum(self.decay_state(state.astype(jnp.float32)) * dstate, axis=0, keepdims=True)[None]
        for level in reversed(self._levels):
            pairs = level.pairs
            decayed_q, decayed_k = pairs.take(q, 1) * level.to_right, pairs.take(k, 0) * level.from_left
            all_q = pairs.join(pairs.take(q, 0), decayed_q) if pairs.whole_tiles else decayed_q
            all_k = pairs.join(decayed_k, pairs.take(k, 1)) if pairs.whole_tiles else decayed_k
            own_q = _at_level(pairs.take(distance, 1), pairs.size)
            own_k = _at_level(pairs.take(distance_transposed, 0), pairs.size)
            ddecayed_q = product(jnp.where(own_q, pairs.take(dscores, 1), 0.0), all_k, (1, 0), dtype)
            ddecayed_k = product(jnp.where(own_k, pairs.take(dscores_transposed, 0), 0.0), all_q, (1, 0), dtype)
            block = jnp.where(own_k, product(decayed_k, all_q, (1, 1), dtype), pairs.take(scores_transposed, 0))
            on_right, on_left = decayed_q * ddecayed_q, decayed_k * ddecayed_k
            if pairs.whole_tiles:
                scores_transposed = pairs.join(block, pairs.take(scores_transposed, 1))
                dq = pairs.join(pairs.take(dq, 0), pairs.take(dq, 1) + level.to_right * ddecayed_q)
                dk = pairs.join(pairs.take(dk, 0) + level.from_left * ddecayed_k, pairs.take(dk, 1))
                from_right = self._block_sums(pairs.take(dto, 1), pairs.size)
                from_left = self._block_sums(pairs.take(dfrom, 0), pairs.size)
                dsum = jnp.stack([dsum + from_right, dsum + from_left], axis=1)
                dsum = dsum.reshape(chunk // pairs.size, 1, width)
                if pairs.size == SUBLANES:
                    dsum = self._spread(dsum, pairs.size)
                dto = pairs.join(pairs.take(dto, 0), pairs.take(dto, 1) + on_right)
                dfrom = pairs.join(pairs.take(dfrom, 0) + on_left, pairs.take(dfrom, 1))
            else:
                scores_transposed = block
                dq, dk = dq + level.to_right * ddecayed_q, dk + level.from_left * ddecayed_k
                summed = jnp.where(pairs.is_right(width), dto, dfrom)
                step = 1
                while step < pairs.size:
                    summed = summed + Pairs(step, chunk).sibling(summed)
                    step *= 2
                dsum = dsum + pairs.sibling(summed)
                dto, dfrom = dto + on_right, dfrom + on_left
        dv = product(scores_transposed, dout, (1, 0), dtype)
        dv += product(k * self._from_token, dstate, (1, 1), dtype)
        return self._scale * dq, dk, dv, dto + dsum

    def _scores(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Between the tokens of the chunk, [C, C]."""
        distance = _distance(self._chunk)
        scores = jnp.where(self._on_diagonal, jnp.sum(q * k, axis=1, keepdims=True), 0.0)
        for level in self._levels:
            pairs = level.pairs
            decayed_q = pairs.take(q, 1) * level.to_right
            decayed_k = pairs.join(pairs.take(k, 0) * level.from_left, pairs.take(k, 1))
            block = product(decayed_q, decayed_k, (1, 1), self._operand_dtype)
            rows = jnp.where(pairs.take(distance, 1) >= pairs.size, block, pairs.take(scores, 1))
            scores = pairs.join(pairs.take(scores, 0), rows) if pairs.whole_tiles else rows
        return scores

    @cached_property
    def _on_diagonal(self) -> jax.Array:
        shape = (self._chunk, self._chunk)
        return jax.lax.broadcasted_iota(jnp.int32, shape, 0) == jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def _block_sums(self, rows: jax.Array, size: int) -> jax.Array:
        """[blocks size, K] -> [blocks, 1, K]."""
        return jnp.sum(rows.reshape(-1, size, rows.shape[1]), axis=1, keepdims=True)


def _distance(chunk: int, *, transposed: bool = False) -> jax.Array:
    """[C, C] integers: the bits in which two tokens differ, which tell the pair of blocks that parts them.

    0 where the row's token (the column's with `transposed`) is not the later one.
    """
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))
    later = column > row if transposed else row > column
    return jnp.where(later, row ^ column, 0)


def _at_level(distance: jax.Array, size: int) -> jax.Array:
    return (distance >= size) & (distance < 2 * size)
