"""The cost model's rounds and bytes are those of the compiled programs."""

import math

import pytest

from tests.collectives.exchanges import FLAT, MESHES, PAYLOAD, compiled_text, mesh_id
from zeco_jax.collectives.cost import cost_of, hierarchical_cost
from zeco_jax.collectives.links import HOST
from zeco_jax.pods import Collective, collectives_in


def bytes_on_wire(records: list[Collective], ranks: int, groups: list[int]) -> list[int]:
    """What each rank sends; `groups`: ranks that take part in each all-gather or all-to-all, in program order."""
    sent = [0] * ranks
    groups = list(groups)
    for record in records:
        if record.kind == "collective-permute":
            for source, _ in record.pairs:
                sent[source] += record.bytes
        else:
            size = groups.pop(0)
            # Of the parts that arrive (or leave), one for each rank, a rank's own stays at home.
            sent = [count + record.bytes * (size - 1) // size for count in sent]
    assert not groups
    return sent


def groups_of(schedule: str, ranks: int) -> list[int]:
    return {"gather": [ranks], "transpose": [ranks, ranks]}.get(schedule, [])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("schedule", FLAT)
def test_one_axis(schedule, ranks, reverse):
    records = collectives_in(compiled_text((ranks,), schedule=schedule, reverse=reverse))
    cost = cost_of(schedule, PAYLOAD, ranks, HOST.links((ranks,))[0])
    if schedule == "chain":
        cost = cost_of(schedule, PAYLOAD, ranks, HOST.inside, blocks=len(records) - (ranks - 2))
    assert len(records) == cost.rounds
    sent = bytes_on_wire(records, ranks, groups_of(schedule, ranks))
    assert max(sent) == cost.bytes_sent
    assert sent[-1 if reverse else 0] == cost.bytes_sent


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 6])
def test_blocks_of_the_chain(blocks):
    ranks = 5
    records = collectives_in(compiled_text((ranks,), schedule="chain", blocks=blocks))
    cost = cost_of("chain", PAYLOAD, ranks, HOST.inside, blocks)
    assert len(records) == cost.rounds == ranks - 2 + blocks
    # Four blocks don't divide six rows: the last one is filled up.
    assert max(bytes_on_wire(records, ranks, [])) == cost.bytes_sent


@pytest.mark.parametrize("sizes", MESHES, ids=mesh_id)
def test_several_axes(sizes, monkeypatch):
    monkeypatch.setattr("zeco_jax.collectives.cost.FLAT_SCHEDULES", ("doubling",))
    records = collectives_in(compiled_text(sizes, schedule="hierarchical"))
    cost = hierarchical_cost(PAYLOAD, sizes, HOST.links(sizes), "doubling")
    assert len(records) == cost.rounds
    inner = list(sizes[1:])
    sent = bytes_on_wire(records, math.prod(sizes), [*inner[::-1], *inner])
    assert max(sent) == cost.bytes_sent


@pytest.mark.parametrize("slowest", ["chain", "gather", "transpose"])
def test_schedules_of_the_slowest_axis(slowest, monkeypatch):
    monkeypatch.setattr("zeco_jax.collectives.cost.FLAT_SCHEDULES", (slowest,))
    monkeypatch.setattr("zeco_jax.collectives.cost.MOST_BLOCKS", 1)
    sizes = (4, 2)
    records = collectives_in(compiled_text(sizes, schedule="hierarchical"))
    cost = hierarchical_cost(PAYLOAD, sizes, HOST.links(sizes), slowest)
    assert len(records) == cost.rounds
    sent = bytes_on_wire(records, math.prod(sizes), [2, *groups_of(slowest, 4), 2])
    assert max(sent) == cost.bytes_sent


@pytest.mark.parametrize("schedule", [*FLAT, "hierarchical", "auto"])
def test_one_rank_sends_nothing(schedule):
    assert collectives_in(compiled_text((1,), schedule=schedule)) == []


def test_a_share_of_the_state_crosses_the_slow_axis():
    """Of a 2 x 4 mesh, each rank sends a quarter of the state to the other group."""
    records = collectives_in(compiled_text((2, 4), schedule="hierarchical"))
    across = [record for record in records if record.kind == "collective-permute"]
    assert len(across) == 1
    assert across[0].bytes == PAYLOAD.share(4).state_bytes
    assert across[0].pairs == tuple((rank, rank + 4) for rank in range(4))
