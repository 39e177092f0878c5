"""Which chunks a block of threads walks through, and which way."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Walk:
    """A sequence of chunks cut into stretches, each walked by one block of threads.

    Attributes:
        chunks: of the whole sequence.
        stretches: that it is cut into; the last may be shorter.
        reverse: from the last chunk to the first, as cotangents go.
        closed: the state that the walk ends with is left to the replay, as nobody needs it before.
    """

    chunks: int
    stretches: int
    reverse: bool = False
    closed: bool = False

    @property
    def longest(self) -> int:
        """Chunks of a stretch."""
        return -(-self.chunks // self.stretches)

    @property
    def summarized(self) -> range:
        """The stretches that the replay waits for: of a closed walk all but the last one walked."""
        every = range(self.stretches)
        if not self.closed:
            return every
        return every[1:] if self.reverse else every[:-1]

    def closes(self, stretch: jax.Array) -> jax.Array | bool:
        """Whether the replay of this stretch writes the state that the walk ends with."""
        if not self.closed or self.stretches == 1:
            return self.closed
        return stretch == (0 if self.reverse else self.stretches - 1)

    def steps(self, stretch: jax.Array) -> jax.Array:
        """Chunks of this stretch."""
        return jnp.minimum(self.longest, self.chunks - stretch * self.longest)

    def chunk(self, stretch: jax.Array, step: jax.Array) -> jax.Array:
        """The chunk that a stretch comes to at a step."""
        first = stretch * self.longest
        return first + (self.steps(stretch) - 1 - step if self.reverse else step)

    def summed(self, totals: jax.Array) -> jax.Array:
        """What chunks have [B, H, chunks, *] by summarized stretches, [B, H, summarized, *]."""
        every = jnp.sum(self.by_stretch(totals), axis=3)
        return every[:, :, self.summarized.start : self.summarized.stop]

    def by_stretch(self, x: jax.Array) -> jax.Array:
        """[B, H, chunks, *] as [B, H, stretches, longest, *], with zeros where the last one is shorter."""
        missing = self.stretches * self.longest - self.chunks
        x = jnp.pad(x, ((0, 0), (0, 0), (0, missing), *((0, 0) for _ in x.shape[3:])))
        return x.reshape(*x.shape[:2], self.stretches, self.longest, *x.shape[3:])
