"""Schedules of kernels, from dumps made up here: bundle by bundle what the TPU compiler writes."""

import pytest

from zeco_jax.pods.kernel_cycles import KernelSchedule, read_schedule, read_schedules

HEAD = ["= control target key start", "LH: loop header", "= control target key end", ""]
UNITS = """== CAPACTIY:
MATMUL, XLU, VSTORE:SPILL
    4     3     1
== UTILIZATION:
"""
NOP = ("  :", "{}", (0, 0, 0))
DELAY = [(": >", "{}", (0, 0, 0))] * 4


def step(text="{ vadd }", used=(0, 0, 0), label=""):
    return (f" {label}: >", text, used)


def branch(target, used=(0, 0, 0), label=""):
    return step(f"{{ %9 = sbr.rel (%p1) target = $region{target} }}", used, label)


STATE_SET_UP = [branch(5), *DELAY, step("{ vst }", (0, 0, 1)), step("{ vst }", (0, 0, 1))]
COPY = [branch(6), *DELAY, step("{ dma.hbm_to_vmem }"), step("{ dma.done.wait }", label="PF")]
LOOP = [branch(1), *DELAY]
PRODUCTS = [step("{ vmatmul }", (4, 1, 0)), step("{ vmatmul }", (2, 3, 0))]


def dumps(bundles):
    lines = [f"{i and hex(i)!s} {place} {text}" for i, (place, text, _) in enumerate(bundles)]
    used = [" ".join(map(str, row)) for *_, row in bundles]
    # Comments of a bundle may fill several lines.
    return "\n".join([*HEAD, lines[0], "second_minor_factor: 1 */ }", *lines[1:]]), UNITS + "\n".join(used) + "\n"


def one_way():
    return [NOP, NOP, *STATE_SET_UP, step(label="PF"), *PRODUCTS, *COPY, *LOOP, NOP]


def test_counts_a_step_without_what_only_the_first_does():
    (schedule,) = read_schedule(*dumps(one_way()))
    # All between the loop's first and last bundle, but for the two stores.
    assert schedule.cycles == 5 + 1 + 2 + 7 + 5
    assert schedule.busy == {"MATMUL": 6, "XLU": 4, "VSTORE:SPILL": 0}
    assert schedule.use() == 6 / (4 * schedule.cycles)
    assert schedule.use("XLU") == 4 / (3 * schedule.cycles)


def test_a_schedule_for_each_way():
    mild = [branch(7), *DELAY, *PRODUCTS]
    strong = [branch(8, label="PF"), *DELAY, *PRODUCTS, *PRODUCTS, step(label="PF")]
    schedules = read_schedule(*dumps([NOP, *mild, *strong, *LOOP]))
    common = 5 + 5 + 1 + 5
    assert [schedule.cycles for schedule in schedules] == [common + 2, common + 4]
    assert [schedule.busy["MATMUL"] for schedule in schedules] == [6, 12]


def test_a_branch_around_the_whole_body_is_no_choice():
    around = [branch(9), *DELAY, *STATE_SET_UP, step(label="PF"), *PRODUCTS, step(label="PF")]
    (schedule,) = read_schedule(*dumps([NOP, *around, *LOOP]))
    assert schedule.cycles == 5 + 5 + 1 + 2 + 1 + 5


def test_says_what_is_wrong():
    bundles, utilization = dumps(one_way())
    with pytest.raises(ValueError, match="of one kernel, got 25 and 24 bundles"):
        read_schedule(bundles, utilization.rsplit("\n", 2)[0])
    with pytest.raises(ValueError, match="kernel with a loop, got none"):
        read_schedule(*dumps([NOP, NOP]))


def test_reads_a_folder(tmp_path):
    def write(call, bundles):
        texts = dumps(bundles)
        kinds = ("final_bundles", "final_hlo-static-per-bundle-utilization")
        for number, (kind, text) in enumerate(zip(kinds, texts, strict=True)):
            (tmp_path / f"{call}-{70 + number}-{kind}.txt").write_text(text)

    write("100-walk.1", one_way())
    write("101-walk.1.state.start", [*one_way(), NOP])
    write("102-walk_back", one_way())
    write("103-<late-initialization>", [NOP])
    (tmp_path / "100-walk.1-69-schedule-analysis_final_bundles.txt").write_text("")
    schedules = read_schedules(tmp_path)
    assert list(schedules) == ["walk", "walk 2", "walk_back"]
    assert all(isinstance(way, KernelSchedule) for ways in schedules.values() for way in ways)
