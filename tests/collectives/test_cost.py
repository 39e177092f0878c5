import itertools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.meshes import per_rank
from zeco_jax.collectives.cost import (
    FLAT_SCHEDULES,
    MOST_BLOCKS,
    TIE,
    Payload,
    chain_blocks,
    choose,
    choose_hierarchical,
    cost_of,
    hierarchical_cost,
    levels_of,
)
from zeco_jax.collectives.links import (
    GPU_NODES,
    HOST,
    HOST_CPU,
    ICI_V4,
    ICI_V5E,
    ICI_V5P,
    ICI_V6E,
    INFINIBAND,
    LINKS,
    NETWORK_VARIABLE,
    NVLINK,
    Link,
    Network,
    default_network,
    load_network,
    network_in_scope,
    torus,
)

STATE_2MIB = Payload(rows=32 * 128, width=128)
NETWORKS = {"gpus": GPU_NODES, "host": HOST, "torus": torus(ICI_V5P)}

links = st.sampled_from([NVLINK, INFINIBAND, ICI_V5P, HOST_CPU.among(8)])
payloads = st.builds(Payload, rows=st.integers(1, 5000), width=st.integers(1, 512), itemsize=st.sampled_from([2, 4, 8]))
schedules = st.sampled_from([*FLAT_SCHEDULES, "serial"])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schedules, payloads, st.integers(1, 300), links, st.integers(1, 4))
def test_more_bytes_never_cost_less(schedule, payload, ranks, link, times):
    more = payload._replace(width=payload.width * times)
    small, large = (cost_of(schedule, p, ranks, link, blocks=3) for p in (payload, more))
    assert small.seconds <= large.seconds * (1 + 1e-9)
    assert small.bytes_sent <= large.bytes_sent
    assert small.rounds == large.rounds


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schedules, payloads, st.integers(1, 300), links)
def test_more_ranks_never_cost_less(schedule, payload, ranks, link):
    if link.ring and schedule == "doubling":
        return  # On a ring some messages get a shorter way round when there are more ranks.
    few, many = (cost_of(schedule, payload, p, link) for p in (ranks, ranks + 1))
    assert few.seconds <= many.seconds * (1 + 1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(payloads, st.lists(st.integers(1, 8), min_size=1, max_size=3), st.sampled_from(list(NETWORKS)))
def test_choice_is_the_best_or_close_to_it(payload, sizes, name):
    network = NETWORKS[name]
    choice = choose(payload, sizes, network)
    ranks = math.prod(sizes)
    link = network.links((ranks,))[0]
    rivals = [cost_of(schedule, payload, ranks, link) for schedule in FLAT_SCHEDULES]
    if len(sizes) > 1:
        rivals.append(choose_hierarchical(payload, sizes, network).cost)
    assert choice.cost.seconds <= TIE * min(rival.seconds for rival in rivals) * (1 + 1e-9)
    assert 1 <= choice.blocks <= MOST_BLOCKS
    assert payload.rows % choice.blocks == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(payloads, st.integers(2, 300), links)
def test_blocks_are_the_best_of_the_divisors(payload, ranks, link):
    best = cost_of("chain", payload, ranks, link, chain_blocks(payload, ranks, link))
    for blocks in (b for b in (1, 2, 3, 4, 8, 16, 32) if payload.rows % b == 0):
        assert best.seconds <= cost_of("chain", payload, ranks, link, blocks).seconds


def test_blocks_follow_the_square_root():
    """Four times the bytes or the hops, twice the blocks."""
    link = Link("plain", 1e-6, 0, 0, bandwidth=1e9, memory_bandwidth=1e15)
    counts = [chain_blocks(Payload(1 << 12, 1), 2 + 4**i, link) for i in range(2, 5)]
    assert all(later == 2 * earlier for earlier, later in itertools.pairwise(counts)), counts


@pytest.mark.parametrize("kib", [64, 1024, 65536])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_two_ranks_need_one_round(network, kib):
    choice = choose(Payload(kib * 2, 128), (2,), network)
    assert (choice.schedule, choice.blocks, choice.cost.rounds) == ("doubling", 1, 1)


@pytest.mark.parametrize("kib", [64, 1024, 65536])
def test_one_rank_costs_nothing(kib):
    assert choose(Payload(kib * 2, 128), (1,), GPU_NODES).cost.seconds == 0


@pytest.mark.parametrize(
    ("network", "sizes"),
    [
        pytest.param(GPU_NODES, (32, 8), id="256 GPUs"),
        pytest.param(torus(ICI_V5P), (4, 8, 8), id="v5p:8x8x4"),
        pytest.param(torus(ICI_V5E), (16, 16), id="v5e:16x16"),
        pytest.param(torus(ICI_V6E), (16, 16), id="v6e:16x16"),
    ],
)
def test_256_ranks_in_a_quarter_of_the_papers_time(network, sizes):
    choice = choose(STATE_2MIB, sizes, network)
    assert choice.schedule == "hierarchical"
    assert choice.cost.seconds <= 0.55e-3


@pytest.mark.parametrize("link", [ICI_V5P, ICI_V5E], ids=lambda link: link.name)
def test_one_axis_over_256_chips_is_taken_in_levels(link):
    choice = choose(STATE_2MIB, levels_of(256, link), torus(link))
    assert choice.schedule == "hierarchical"
    flat = [cost_of(name, STATE_2MIB, 256, link, blocks=32).seconds for name in FLAT_SCHEDULES]
    assert choice.cost.seconds < min(flat) / 4


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [(1, (1,)), (6, (6,)), (7, (7,)), (8, (2, 4)), (10, (2, 5)), (14, (7, 2)), (512, (2, 4, 4, 4, 4))],
)
def test_levels_are_small_on_a_torus(ranks, sizes):
    assert levels_of(ranks, ICI_V5P) == sizes
    assert levels_of(ranks, NVLINK) == levels_of(ranks, HOST_CPU) == (ranks,)


def test_a_chain_of_256_gpus_loses():
    link = GPU_NODES.links((256,))[0]
    chain = cost_of("chain", STATE_2MIB, 256, link, chain_blocks(STATE_2MIB, 256, link))
    assert chain.seconds > 5 * choose(STATE_2MIB, (256,), GPU_NODES).cost.seconds


@pytest.mark.parametrize(("gather", "schedule"), [(2.05, "gather"), (2.2, "transpose")])
def test_a_tie_goes_to_fewer_rounds(gather, schedule):
    """Two all-to-alls of a second each against one all-gather that takes a little longer."""
    link = Link("slow to start", 1.0, gather, 1.0, bandwidth=1e15, memory_bandwidth=1e15)
    assert choose(STATE_2MIB, (8,), Network(link, link, 8)).schedule == schedule


def test_hierarchy_of_one_level_is_flat():
    for schedule in FLAT_SCHEDULES:
        flat = cost_of(schedule, STATE_2MIB, 8, NVLINK)
        assert hierarchical_cost(STATE_2MIB, (8,), (NVLINK,), schedule) == flat


def test_unknown_schedule():
    with pytest.raises(ValueError, match="'ring'"):
        cost_of("ring", STATE_2MIB, 4, NVLINK)


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((8,), ["nvlink"]),
        ((16,), ["infiniband"]),
        ((32, 8), ["infiniband", "nvlink"]),
        ((4, 2, 4), ["infiniband", "nvlink", "nvlink"]),
        ((2, 16), ["infiniband", "infiniband"]),
    ],
)
def test_fast_axes_stay_in_a_node(sizes, names):
    assert [link.name for link in GPU_NODES.links(sizes)] == names


def test_shared_link_is_divided():
    part = HOST_CPU.among(4)
    assert part.bandwidth == HOST_CPU.bandwidth / 4
    assert part.permute_latency == HOST_CPU.permute_latency * 4
    assert part.among(4) == part
    assert NVLINK.among(4) == NVLINK


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_every_link_has_a_source(link):
    assert len(link.source) > 40


@pytest.mark.parametrize("name", ["bandwidth", "memory_bandwidth", "permute_latency"])
def test_impossible_constant_is_named(name):
    constants = {"permute_latency": 1e-6, "bandwidth": 1e9, "memory_bandwidth": 1e9, name: -1.0}
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        Link("broken", gather_latency=0, all_to_all_latency=0, **constants)


def test_saved_and_loaded(tmp_path, monkeypatch):
    path = tmp_path / "network.json"
    GPU_NODES.save(path)
    assert load_network(path) == GPU_NODES
    monkeypatch.setenv(NETWORK_VARIABLE, str(path))
    assert default_network("cpu") == GPU_NODES
    assert network_in_scope() == GPU_NODES


@pytest.mark.parametrize("content", [None, "", "[]", "{}", json.dumps({"inside": {}, "across": {}, "node_size": 8})])
def test_unreadable_network_is_named(tmp_path, content):
    path = tmp_path / "network.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"network.*network\.json"):
        load_network(path)


@pytest.mark.parametrize(
    ("platform", "kind", "link"),
    [
        ("cpu", "cpu", HOST_CPU),
        ("gpu", "NVIDIA H200", NVLINK),
        ("cuda", "", NVLINK),
        ("tpu", "TPU v4", ICI_V4),
        ("tpu", "TPU v5", ICI_V5P),
        ("tpu", "TPU v5p", ICI_V5P),
        ("tpu", "TPU v5 lite", ICI_V5E),
        ("tpu", "TPU v5e", ICI_V5E),
        ("tpu", "TPU v6 lite", ICI_V6E),
        ("tpu", "", ICI_V5P),
    ],
)
def test_default_link_of_a_device(monkeypatch, platform, kind, link):
    monkeypatch.delenv(NETWORK_VARIABLE, raising=False)
    assert default_network(platform, kind).inside == link


@pytest.mark.parametrize(("kind", "link"), [("TPU v5 lite", ICI_V5E), ("TPU v5", ICI_V5P), ("cpu", HOST_CPU)])
def test_network_of_devices_that_are_elsewhere(monkeypatch, kind, link):
    """A program is compiled for a pod on a machine without one."""
    device = SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: SimpleNamespace(abstract_device=device))
    monkeypatch.delenv(NETWORK_VARIABLE, raising=False)
    assert network_in_scope().inside == link


def test_network_of_this_machine(monkeypatch):
    monkeypatch.delenv(NETWORK_VARIABLE, raising=False)
    found = []
    per_rank(lambda x: found.append(network_in_scope()) or x, 2)(jnp.ones(2))
    assert found == [default_network(jax.default_backend(), jax.devices()[0].device_kind)]
    assert network_in_scope() == found[0]
