"""Loops over chunks most of which are of one kind: each kind has a loop of its own."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


def walk_runs[Carry](
    steps: jax.Array,
    is_strong: Callable[[jax.Array], jax.Array],
    some_strong: jax.Array,
    body: Callable[..., Carry],
    first: Callable[[], Carry],
    last: Callable[[Carry], None],
    park: Callable[[Carry], None],
    parked: Callable[[], Carry],
) -> None:
    """Runs of weak chunks and runs of strong ones in turns, in their order.

    What strong chunks need more of, registers above all, weak ones then don't pay for: least where all are weak, which
    is a loop on its own. Between runs what is carried is in memory: in registers, the compiler would make room for
    strong chunks' needs all along.

    Args:
        steps: how many chunks.
        is_strong: whether the chunk of a step is strong.
        some_strong: whether one of these chunks is.
        body: from a step and what is carried to what is carried on; `some_strong` says which kind of chunk it is.
        first: gives what is carried into the first step.
        last: takes what is carried out of the last one.
        park: writes what is carried to memory.
        parked: reads it.
    """

    def kind(step: jax.Array) -> jax.Array:
        return is_strong(jnp.minimum(step, steps - 1))

    def run(place: tuple[jax.Array, jax.Array], *, some_strong: bool) -> tuple[jax.Array, jax.Array]:
        def advance(carry: tuple) -> tuple:
            step, _, rest = carry
            # Asked for before it is needed: it comes from device memory.
            following = kind(step + 1)
            return step + 1, following, body(step, rest, some_strong=some_strong)

        def goes_on(carry: tuple) -> jax.Array:
            return jnp.logical_and(carry[0] < steps, carry[1] == some_strong)

        *place, rest = lax.while_loop(goes_on, advance, (*place, parked()))
        park(rest)
        return tuple(place)

    def both(place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return run(run(place, some_strong=False), some_strong=True)

    @pl.when(jnp.logical_not(some_strong))
    def _at_once() -> None:
        last(lax.fori_loop(0, steps, partial(body, some_strong=False), first()))

    @pl.when(some_strong)
    def _in_runs() -> None:
        park(first())
        start = jnp.int32(0)
        lax.while_loop(lambda place: place[0] < steps, both, (start, kind(start)))
        last(parked())
