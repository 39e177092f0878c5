"""Which chunks a block of threads walks through, and which way."""

import jax.numpy as jnp
import pytest

from zeco_jax.attention.hopper.walk import Walk

# Stretches of 5, 5, 5 and 2 chunks.
CHUNKS, STRETCHES = 17, 4


def walked(walk, stretches):
    """The chunks of some stretches, in the order that the sequence is walked in."""
    order = reversed(stretches) if walk.reverse else stretches
    return [walk.chunk(stretch, step) for stretch in order for step in range(walk.steps(stretch))]


@pytest.mark.parametrize("closed", [False, True])
def test_every_chunk_comes_once(closed):
    every = range(STRETCHES)
    assert walked(Walk(CHUNKS, STRETCHES, closed=closed), every) == list(range(17))
    assert walked(Walk(CHUNKS, STRETCHES, reverse=True, closed=closed), every) == list(range(17))[::-1]


def test_a_closed_walk_summarizes_all_but_the_stretch_that_closes_it():
    forward, back = (Walk(CHUNKS, STRETCHES, reverse, closed=True) for reverse in (False, True))
    assert walked(forward, forward.summarized) == list(range(15))
    assert walked(back, back.summarized) == list(range(16, 4, -1))
    assert [forward.closes(stretch) for stretch in range(STRETCHES)] == [False, False, False, True]
    assert [back.closes(stretch) for stretch in range(STRETCHES)] == [True, False, False, False]


def test_others_summarize_all_stretches():
    walk = Walk(CHUNKS, STRETCHES)
    assert walk.summarized == range(STRETCHES)
    assert not any(map(walk.closes, walk.summarized))


@pytest.mark.parametrize("reverse", [False, True])
def test_sums_by_summarized_stretch(reverse):
    totals = jnp.arange(CHUNKS, dtype=jnp.float32)[None, None, :, None]
    every = [sum(range(first, min(first + 5, CHUNKS))) for first in range(0, CHUNKS, 5)]
    assert Walk(CHUNKS, STRETCHES, reverse).summed(totals).ravel().tolist() == every
    closed = Walk(CHUNKS, STRETCHES, reverse, closed=True)
    assert closed.summed(totals).ravel().tolist() == (every[1:] if reverse else every[:-1])


def test_one_stretch():
    walk = Walk(CHUNKS, 1, closed=True)
    assert not walk.summarized
    assert walk.closes(0) is True
