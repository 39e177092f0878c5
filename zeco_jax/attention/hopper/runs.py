"""Loops over chunks most of which are of one kind: each kind has a loop of its own."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from zeco_jax.attention.hopper.tile import Ref


def walk_runs[Carry](
    steps: jax.Array,
    strong: Ref,
    some_strong: jax.Array,
    chunk: Callable[[jax.Array], jax.Array],
    body: Callable[..., Carry],
    first: Callable[[], Carry],
    last: Callable[[Carry], None],
) -> None:
    """Runs of weak chunks and runs of strong ones in turns, in their order.

    What strong chunks need more of, registers above all, weak ones then don't pay for: least where all are weak, which
    is a loop on its own.

    Args:
        steps: how many chunks.
        strong: [chunks] int32, 1 where a chunk is strong, else 0.
        some_strong: whether one of these chunks is strong.
        chunk: the chunk of a step.
        body: from a step and what is carried to what is carried on; `some_strong` says which kind of chunk it is.
        first: gives what is carried into the first step.
        last: takes what is carried out of the last one.
    """

    def kind(step: jax.Array) -> jax.Array:
        return strong[chunk(jnp.minimum(step, steps - 1))]

    def run(carry: tuple, *, some_strong: bool) -> tuple:
        def advance(carry: tuple) -> tuple:
            step, _, rest = carry
            # Asked for before it is needed: it comes from device memory.
            following = kind(step + 1)
            return step + 1, following, body(step, rest, some_strong=some_strong)

        def goes_on(carry: tuple) -> jax.Array:
            return jnp.logical_and(carry[0] < steps, carry[1] == int(some_strong))

        return lax.while_loop(goes_on, advance, carry)

    def both(carry: tuple) -> tuple:
        return run(run(carry, some_strong=False), some_strong=True)

    @pl.when(some_strong)
    def _in_runs() -> None:
        start = jnp.int32(0)
        last(lax.while_loop(lambda carry: carry[0] < steps, both, (start, kind(start), first()))[2])

    @pl.when(jnp.logical_not(some_strong))
    def _at_once() -> None:
        last(lax.fori_loop(0, steps, partial(body, some_strong=False), first()))
