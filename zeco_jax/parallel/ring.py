"""Runs rounds of blocks over the ranks of a ring: what is fetched, computed, passed on and brought home."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from zeco_jax.collectives import AxisName, axis_index, axis_size
from zeco_jax.parallel.ring_schedule import KEY, QUERY, Links, Round, Task, Traffic, neighbours, owners, traffic


class Block(Protocol):
    """Computes one task."""

    def __call__(self, task: Task, queries: Any, keys: Any, *, causal: bool) -> tuple[Any, Any]:
        """The results for the queries and those for the keys, two pytrees; the ranks of `task` are traced integers."""


class Joining(NamedTuple):
    """How partial results become one.

    Attributes:
        join: two parts together.
        only: `(condition, part)`: the part where the condition holds, otherwise one that adds nothing.
    """

    join: Callable[[Any, Any], Any]
    only: Callable[[jax.Array, Any], Any]


SUM = Joining(
    join=lambda one, other: jax.tree.map(jnp.add, one, other),
    only=lambda condition, part: jax.tree.map(lambda x: jnp.where(condition, x, 0), part),
)


def run_rounds(
    rounds: tuple[Round, ...],
    axis_name: AxisName,
    block: Block,
    owned: tuple[Any, Any],
    joinings: tuple[Joining, Joining],
) -> tuple[Any, Any]:
    """Computes all blocks of the rounds, one per rank and round, and brings their results to the ranks they are for.

    While a block is computed, what the next one needs travels, and so do the results of the one before. Results for
    another rank gather up on the way as long as that rank's queries, or keys, are passed on, and then go home.

    Args:
        rounds: who computes what.
        axis_name: mesh axis or tuple of axes of the ranks.
        block: computes a task; no collectives in it.
        owned: this rank's queries and keys, two pytrees.
        joinings: how the results for queries, and those for keys, are joined.

    Returns:
        The joined results for this rank's queries, and those for its keys.
    """
    sides = [_Side(place, *of_side, axis_name) for place, *of_side in zip((QUERY, KEY), owned, joinings, strict=True)]
    held, totals, visiting = owned, (None, None), (None, None)
    for previous, present, following in neighbours(rounds):
        links = [traffic(previous, present, following, side.place) for side in sides]
        arrived = [side.send(*of_side) for side, *of_side in zip(sides, links, held, visiting, strict=True)]
        results = (None, None)
        if present:
            task = Task(*(_here(owners(present, side.place), axis_name) for side in sides))
            causal = all(task is not None and task.query == task.key for task in present)
            results = block(task, *held, causal=causal)
        # All messages of a round travel while its block is computed. Else the compiler is free to fetch the keys of
        # all rounds at once, to let a block wait for what only the next one needs, and to put off what came home.
        arrived, results, totals = jax.lax.optimization_barrier((arrived, results, totals))
        settled = [
            side.settle(present, *of_side)
            for side, *of_side in zip(sides, links, arrived, results, totals, strict=True)
        ]  # fmt: skip
        held, totals, visiting = zip(*settled, strict=True)
    return totals


@dataclass(frozen=True)
class _Side:
    """One side of this rank's tasks.

    Attributes:
        place: its place in a task.
        owned: this rank's queries (or keys).
        joining: how results for them are joined.
        axis_name: mesh axis or tuple of axes of the ranks.
    """

    place: int
    owned: Any
    joining: Joining
    axis_name: AxisName

    def send(self, links: Traffic, held: Any, visiting: Any) -> Traffic:
        """What arrives over each kind of links: zeros on a rank without one, None if there are none at all."""

        def permute(x: Any, links: Links) -> Any:
            return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis_name, links), x) if links else None

        return Traffic(permute(held, links.fetched), permute(visiting, links.passed), permute(visiting, links.home))

    def settle(
        self, present: Round, links: Traffic, arrived: Traffic, results: Any, total: Any
    ) -> tuple[Any, Any, Any]:
        """After a round: what is held in the next, the total of results for this rank, and what is for another."""
        fetched, passed, home = (self._is_target(of_kind) for of_kind in links)
        held = self.owned
        if links.fetched:
            held = jax.tree.map(partial(jnp.where, fetched), arrived.fetched, held)
        mine = [task is not None and task[self.place] == rank for rank, task in enumerate(present)]
        own = self.joining.only(_here(mine, self.axis_name), results) if any(mine) else None
        home = self.joining.only(home, arrived.home) if links.home else None
        passed = self.joining.only(passed, arrived.passed) if links.passed else None
        return held, self._join(total, own, home), self._join(passed, results)

    def _is_target(self, links: Links) -> jax.Array:
        targets = {target for _, target in links}
        return _here([rank in targets for rank in range(axis_size(self.axis_name))], self.axis_name)

    def _join(self, *parts: Any) -> Any:
        """All parts but those that are None; None if all are."""
        given = [part for part in parts if part is not None]
        return reduce(self.joining.join, given) if given else None


def _here(values: Sequence, axis_name: AxisName) -> jax.Array:
    """This rank's value."""
    return jnp.asarray(values)[axis_index(axis_name)]
