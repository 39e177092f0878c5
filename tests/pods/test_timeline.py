"""A schedule walked with a clock: one flop a second, ten bytes a second on the wire."""

import pytest

from tests.pods.test_wires import LINK
from zeco_jax.pods import Rates, Wires, Work, chip_of, timeline, traffic_in

HEAD = """HloModule m, is_scheduled=true

%double (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %d = f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

"""
ENTRY = "ENTRY %e (a: f32[4,4]) -> f32[4,4] {\n  %a = f32[4,4]{1,0} parameter(0)\n"
PAIRS = "source_target_pairs={{0,1},{1,2}}"
ATTEND = 'metadata={op_name="jit(train)/jvp()/while/body/shard_map/jit(attend)/ppermute"}'
FLOPS = 2 * 4**3
# 2 seconds of latency and 64 bytes.
WIRE = 2 + 6.4


def start(name: str, operand: str = "a", metadata: str = ATTEND) -> str:
    types = "(f32[4,4]{1,0}, f32[4,4]{1,0}, u32[], u32[])"
    return f"  %{name} = {types} collective-permute-start(%{operand}), {PAIRS}, {metadata}\n"


def done(name: str, of: str) -> str:
    return f"  %{name} = f32[4,4]{{1,0}} collective-permute-done(%{of})\n"


def work(name: str, operand: str = "a") -> str:
    return f"  %{name} = f32[4,4]{{1,0}} fusion(%{operand}), kind=kOutput, calls=%double\n"


def walk(*lines: str, seconds: float = 1.0, head: str = HEAD):
    text = head + ENTRY + "".join(lines) + "}\n"
    return timeline(text, lambda work: seconds * work.flops / FLOPS, Wires(LINK))


@pytest.mark.parametrize(("seconds", "exposed"), [(1.0, WIRE - 1), (5.0, WIRE - 5), (100.0, 0.0)])
def test_what_work_does_not_cover_is_waited_for(seconds, exposed):
    found = walk(start("s"), work("w"), done("d", "s"), seconds=seconds)
    assert found.work == seconds
    assert found.exposed == pytest.approx(exposed)
    (wait,) = found.waits
    assert (wait.wire, wait.hidden_by) == (pytest.approx(WIRE), pytest.approx(seconds))


def test_work_outside_hides_nothing():
    assert walk(work("w"), start("s"), done("d", "s"), work("v")).exposed == pytest.approx(WIRE)


def test_two_at_a_time_share_the_wire():
    found = walk(start("s"), start("t"), work("w"), done("d", "s"), done("c", "t"), seconds=10.0)
    # The second's bytes go after the first's, their latencies pass together.
    assert [wait.exposed for wait in found.waits] == pytest.approx([0, 2 + 2 * 6.4 - 10])


def test_the_same_work_hides_only_once():
    """The second's bytes wait for the first's, though the work lies within both."""
    found = walk(start("s"), work("w"), start("t"), done("d", "s"), done("c", "t"), seconds=1.0)
    assert found.exposed == pytest.approx(2 + 2 * 6.4 - 1)


def test_a_synchronous_collective_is_waited_for():
    line = "  %g = f32[8,4]{1,0} all-gather(%a), replica_groups={{0,1}}, dimensions={0}\n"
    found = walk(line, work("w"))
    assert found.exposed == pytest.approx(3 + 128 / 2 / 10)
    assert traffic_in(found.waits)[0]._replace(wire=0, exposed=0) == (
        "other", 1, 1, ("all-gather",), 64, 0, 0, 0.0, 0,
    )  # fmt: skip


def in_a_loop(runs: int, *lines: str) -> str:
    body = "%body (x: f32[4,4]) -> f32[4,4] {\n  %a = f32[4,4]{1,0} parameter(0)\n" + "".join(lines) + "}\n\n"
    loop = f'backend_config={{"known_trip_count":{{"n":"{runs}"}}}}\n'
    return HEAD + body + ENTRY + f"  %loop = f32[4,4]{{1,0}} while(%a), condition=%c, body=%body, {loop}}}\n"


def test_a_loop_counts_as_often_as_it_runs():
    text = in_a_loop(24, start("s"), work("w"), done("d", "s"))
    found = timeline(text, lambda work: 1.0, Wires(LINK))
    assert found.work == 24
    assert found.flops == 24 * FLOPS
    assert found.exposed == pytest.approx(24 * (WIRE - 1))
    (states,) = traffic_in(found.waits)
    assert (states.purpose, states.exchanges, states.rounds, states.rounds_with_work) == ("states, forward", 24, 1, 1)
    assert states.bytes == 24 * 64


def test_an_exchange_that_is_gone_through_twice_is_seen():
    twice = in_a_loop(24, start("s"), done("d", "s"), start("t", "d"), done("c", "t"))
    (states,) = traffic_in(timeline(twice, lambda work: 1.0, Wires(LINK)).waits)
    assert (states.exchanges, states.rounds) == (48, 1)


@pytest.mark.parametrize(
    ("source", "purpose"),
    [
        ("jit(train)/jvp()/while/body/shard_map/jit(attend)/ppermute", "states, forward"),
        ("jit(train)/transpose(jvp())/while/body/checkpoint/shard_map/jit(attend)/ppermute", "states, backward"),
        (
            "jit(train)/transpose(jvp())/while/body/checkpoint/rematted_computation/shard_map/jit(attend)/ppermute",
            "states, forward again",
        ),
        ("jit(train)/jvp()/while/body/shard_map/all_to_all", "heads, forward"),
        ("jit(train)/transpose(jvp())/while/body/checkpoint/shard_map/all_to_all", "heads, backward"),
        ("jit(train)/transpose(jvp())/while/body/dot_general", "gradients"),
        ("jit(train)/shard_map/ppermute", "other"),
    ],
)
def test_purpose_is_read_from_the_name(source, purpose):
    found = walk(start("s", metadata=f'metadata={{op_name="{source}"}}'), done("d", "s"))
    assert [row.purpose for row in traffic_in(found.waits)] == [purpose]


def test_a_piece_of_work_takes_as_long_as_its_products_or_its_bytes():
    chip = chip_of("TPU v5")
    rates = Rates(chip, flops_fraction=0.5, memory_fraction=0.25)
    products = Work("w", "fusion", flops=459 * 10**12, cycles=0, bytes=1)
    moved = Work("w", "fusion", flops=1, cycles=1750, bytes=2765 * 10**9)
    assert rates.seconds(products) == pytest.approx(2)
    assert rates.seconds(moved) == pytest.approx(4)
    assert rates.compiler_seconds(moved) == pytest.approx(1e-6, rel=1e-2)


def test_unknown_chip_is_named():
    with pytest.raises(ValueError, match=r"device_kind.*'TPU v99'"):
        chip_of("TPU v99")
