"""Loops over chunks most of which are of one kind: each kind has a loop of its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


def walk_runs[Carry](
    steps: jax.Array,
    first_strong: jax.Array,
    body: Callable[..., tuple[jax.Array, Carry]],
    first: Callable[[], Carry],
    last: Callable[[Carry], None],
    park: Callable[[Carry], None],
    parked: Callable[[], Carry],
    *,
    some_strong: jax.Array | None = None,
) -> None:
    """Runs of weak chunks and runs of strong ones in turns, in their order.

    What strong chunks need more of, registers above all, weak ones then don't pay for: least those before the first
    strong one (with `some_strong`: where all are weak), which have a loop on their own. Between runs what is carried is
    in memory: in registers, the compiler would make room for strong chunks' needs all along.

    Args:
        steps: how many chunks.
        first_strong: whether the first chunk is strong.
        body: from a step and what is carried to whether the next chunk is strong (after the last one anything) and what
            is carried on; `some_strong` says which kind of chunk it is.
        first: gives what is carried into the first step.
        last: takes what is carried out of the last one.
        park: writes what is carried to memory.
        parked: reads it.
        some_strong: whether any chunk is, if that is known before; two loops of which one runs are quicker than two in
            a row, which share what the compiler computes before both.
    """

    def run(
        place: tuple[jax.Array, jax.Array], carry: Carry, *, some_strong: bool
    ) -> tuple[jax.Array, jax.Array, Carry]:
        def advance(place: tuple) -> tuple:
            step, _, carry = place
            return step + 1, *body(step, carry, some_strong=some_strong)

        def goes_on(place: tuple) -> jax.Array:
            return jnp.logical_and(place[0] < steps, place[1] == some_strong)

        return lax.while_loop(goes_on, advance, (*place, carry))

    def parking(place: tuple[jax.Array, jax.Array], *, some_strong: bool) -> tuple[jax.Array, jax.Array]:
        *place, carry = run(place, parked(), some_strong=some_strong)
        park(carry)
        return tuple(place)

    def both(place: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return parking(parking(place, some_strong=True), some_strong=False)

    def go_on(*place: jax.Array) -> None:
        lax.while_loop(lambda place: place[0] < steps, both, place)
        last(parked())

    if some_strong is None:
        *place, carry = run((jnp.int32(0), first_strong), first(), some_strong=False)
        is_through = place[0] == steps

        @pl.when(is_through)
        def _all_weak() -> None:
            last(carry)

        @pl.when(jnp.logical_not(is_through))
        def _in_runs() -> None:
            park(carry)
            go_on(*place)

        return

    @pl.when(jnp.logical_not(some_strong))
    def _at_once() -> None:
        last(lax.fori_loop(0, steps, lambda step, carry: body(step, carry, some_strong=False)[1], first()))

    @pl.when(some_strong)
    def _in_turns() -> None:
        park(first())
        go_on(jnp.int32(0), first_strong)
