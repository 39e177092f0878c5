"""Routes over a torus, and what collectives take on them."""

import itertools

import pytest

from zeco_jax.collectives.links import Link
from zeco_jax.pods import Collective, Torus, Wires

LINK = Link(
    "test", permute_latency=2.0, gather_latency=3.0, all_to_all_latency=4.0, bandwidth=10.0, memory_bandwidth=1.0,
    hop_latency=1.0,
)  # fmt: skip


def grid(*sizes: int, rings: bool = True) -> Torus:
    return Torus(tuple(itertools.product(*map(range, sizes))), sizes, (rings,) * len(sizes))


def permute(size: int, *pairs: tuple[int, int]) -> Collective:
    return Collective("p", "collective-permute", size, pairs, asynchronous=True)


def test_a_ring_is_gone_round_the_shorter_way():
    ring, line = grid(8), grid(8, rings=False)
    assert [len(ring.route(0, target)) for target in range(8)] == [0, 1, 2, 3, 4, 3, 2, 1]
    assert [len(line.route(0, target)) for target in range(8)] == list(range(8))


def test_axes_are_gone_along_one_by_one():
    assert grid(4, 4).route(0, 5) == [((0, 0), 0, 1), ((1, 0), 1, 1)]


def test_a_permute_takes_as_long_as_its_busiest_link():
    wires = Wires(LINK, grid(8))
    assert wires.transit(permute(30, (0, 1))).seconds == 2 + 3
    shift_by_three = permute(30, *((rank, (rank + 3) % 8) for rank in range(8)))
    # Each link is passed by three messages, each message passes three links.
    assert wires.transit(shift_by_three).seconds == 2 + 2 + 3 * 3


def test_without_a_torus_everybody_is_a_neighbour():
    assert Wires(LINK).transit(permute(30, (0, 5), (1, 6))).seconds == 2 + 3


@pytest.mark.parametrize(
    ("kind", "latency", "sent"),
    [("all-gather", 3 + 8, 6300), ("all-reduce", 2 * (3 + 8), 2 * 6300), ("all-to-all", 4 + 8, 4 * 6300)],
)
def test_collectives_use_all_links_of_a_torus(kind, latency, sent):
    """64 chips, at most 8 links apart and 4 on average, each with 4 links; of 6400 bytes 1 / 64 stays at home."""
    collective = Collective("c", kind, 6400, (), asynchronous=False, group=64)
    assert Wires(LINK, grid(8, 8)).transit(collective).seconds == latency + sent / 4 / 10


def test_nobody_to_send_to_takes_no_time():
    assert Wires(LINK).transit(permute(30)).seconds == 0
