"""What one line of HLO says of a collective."""

import pytest

from tests.pods import programs
from zeco_jax.pods import collectives_in


def line(kind: str, rest: str, type_: str = "f32[8,16]{1,0}") -> str:
    return f"  %x.1 = {type_} {kind}(%p), channel_id=1, {rest}"


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['data'=2,'seq'=4] {'seq'}", 4),
        ("mesh['data'=2,'seq'=4] {'data','seq'}", 8),
        ("mesh['all'=8] {'all':(1)2}", 2),
        ("{}", 0),
    ],
)
def test_size_of_the_groups(groups, size):
    (found,) = collectives_in(line("all-reduce", f"replica_groups={groups}, use_global_device_ids=true"))
    assert found.group == size


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-gather", 384), ("all-to-all", 384), ("all-reduce", 768), ("reduce-scatter", 3 * 512)],
)
def test_what_a_rank_sends_at_least(kind, sent):
    (found,) = collectives_in(line(kind, "replica_groups={{0,1,2,3}}"))
    assert found.bytes == 512
    assert found.wire_bytes == sent


def test_a_permute_sends_what_it_holds():
    (found,) = collectives_in(line("collective-permute", "source_target_pairs={{0,1},{1,2}}"))
    assert (found.wire_bytes, found.group) == (512, 0)


def test_the_name_of_the_operation_is_kept():
    (found,) = collectives_in(
        line("all-reduce", 'replica_groups={}, metadata={op_name="jit(f)/psum" stack_frame_id=3}')
    )
    assert found.source == "jit(f)/psum"


def test_a_collective_that_is_threaded_through_fusions_counts_once():
    (gather,) = collectives_in((programs.HERE / "gather.hlo").read_text())
    assert (gather.kind, gather.group, gather.asynchronous) == ("all-gather", 8, True)
