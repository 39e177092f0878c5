"""Rounds on a mesh: every block's results come home, one block per rank and round, and nothing waits for a message."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from tests.meshes import RANKS, per_rank
from zeco_jax.parallel.ring import SUM, run_rounds
from zeco_jax.parallel.ring_schedule import critical_path, ring_rounds

SCHEDULES = pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "plain"])


def meetings(balanced, queries, keys):
    """Results for queries and for keys: the sum of what they met, times a sine as a mark of a block in the jaxpr."""

    def block(task, queries, keys, *, causal):
        mark = jnp.sin(queries[0] + keys[0])
        # Both say who they are: no block of others than the task's.
        ours = (queries[task.query] == 1) & (keys[task.key] == 1) & (causal == (task.query == task.key))
        return jnp.where(ours, keys, jnp.nan) + 0 * mark, jnp.where(ours, queries, jnp.nan)

    rounds = ring_rounds(queries.size, balanced=balanced)
    return run_rounds(rounds, "seq", block, (queries, keys), (SUM, SUM))


@SCHEDULES
@pytest.mark.parametrize("ranks", RANKS)
def test_everybody_meets_whom_it_should_once(ranks, balanced):
    names = np.eye(ranks, dtype=np.float32)
    met_keys, met_queries = jax.jit(per_rank(partial(meetings, balanced), ranks))(names, names)
    np.testing.assert_array_equal(met_keys, np.tril(np.ones((ranks, ranks))))
    np.testing.assert_array_equal(met_queries, np.triu(np.ones((ranks, ranks))))


@SCHEDULES
@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_a_round_is_one_block_beside_its_messages(ranks, balanced):
    """The messages that block n waits for were sent before block n - 1, so that they travel while that is computed."""
    names = np.eye(ranks, dtype=np.float32)
    jaxpr = jax.make_jaxpr(per_rank(partial(meetings, balanced), ranks))(names, names).jaxpr
    blocks, messages = [], []
    longest_paths(jaxpr, [(0, 0)] * 2, blocks, messages)
    rounds = critical_path(ranks, balanced=balanced)
    # (blocks, messages) one after the other, before each block and before each message.
    beside = [(number, number) for number in range(rounds)]
    assert blocks == beside
    # All but those of the last block's results travel beside a block.
    assert {path for path in messages if path[0] < rounds} <= set(beside)


def longest_paths(jaxpr: Jaxpr, inputs, blocks, messages):
    """How many blocks and messages each result of a jaxpr waits for; those of each block and message are collected."""
    paths = dict(zip(jaxpr.invars, inputs, strict=True))

    def path(x):
        return (0, 0) if isinstance(x, Literal) else paths.get(x, (0, 0))

    for equation in jaxpr.eqns:
        arguments = [path(x) for x in equation.invars]
        block, message = map(max, zip((0, 0), *arguments, strict=True))
        results = [(block, message)] * len(equation.outvars)
        if equation.primitive.name == "sin":
            blocks.append((block, message))
            results = [(block + 1, message)]
        elif equation.primitive.name == "ppermute":
            messages.append((block, message))
            results = [(block, message + 1)]
        elif inner := equation.params.get("jaxpr"):
            inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            results = longest_paths(inner, arguments, blocks, messages)
        paths.update(zip(equation.outvars, results, strict=True))
    return [path(x) for x in jaxpr.outvars]
