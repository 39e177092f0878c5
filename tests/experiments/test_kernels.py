import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from experiments import kernel_peers, kernels
from experiments.kernel_cases import (
    SHAPES,
    Case,
    Floor,
    Rates,
    Shape,
    bytes_moved,
    check_arrays,
    floor_of,
    operations,
    relative_rms,
)
from experiments.kernel_programs import Contender, draw, lower_all, prepare
from experiments.measuring import Timing
from tests.agreement import RELATIVE_RMS
from tests.experiments.mistakes import error_of
from zeco_jax.attention import BACKENDS, XlaBackend

SMALL = Shape(batch=1, tokens=4, heads=2, key_width=8, value_width=16)
# Elements of q and of v of SMALL.
KEYS, VALUES = 64, 128


class Refusing(XlaBackend):
    def replay(self, *arguments):
        raise NotImplementedError("no kernel for K = 16")


def test_writes_tables_record_and_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(BACKENDS, "refusing", Refusing)
    chosen = ["--shapes", "tiny", "--decays", "token", "--backends", "xla", "refusing", "hopper", "--seconds", "0.01"]
    assert kernels.main([*chosen, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert (tmp_path / "kernels-cpu.png").read_bytes().startswith(b"\x89PNG")
    rows = {(row["name"], row["pass"]): row for row in result["measurements"]}
    names = ("xla", "refusing", "hopper", "softmax (cuDNN)", "FLA")
    assert list(rows) == [(name, direction) for direction in ("forward", "gradient") for name in names]

    for direction, compared in (("forward", ["out"]), ("gradient", ["q", "k", "v", "log_decay"])):
        row = rows["xla", direction]
        low, median, high = row["seconds"]
        assert 0 < low <= median <= high
        assert row["over_floor"] == pytest.approx(median / row["floor"]["seconds"])
        assert row["extra_bytes"] > 256 * 2 * 16 * 2
        assert list(row["relative_rms"]) == compared
        assert all(0 < error < RELATIVE_RMS["bfloat16"] for error in row["relative_rms"].values())
        for name, reason in (
            ("refusing", "no kernel for K = 16"),
            ("hopper", "backend 'hopper' can't serve this call"),
            ("softmax (cuDNN)", "needs a GPU"),
            ("FLA", ""),
        ):
            row = rows[name, direction]
            assert row["seconds"] is None
            assert row["note"].startswith(reason)
            assert row["note"]
    printed = capsys.readouterr().out
    assert "no kernel for K = 16" in printed
    assert rows["FLA", "forward"]["note"].split()[0] in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shapes", "huge"], "shapes: unknown huge"),
        (["--shapes"], "shapes: none given"),
        (["--backends", "cuda"], "backends: unknown cuda"),
        (["--decays", "exponential"], "decays"),
        (["--passes", "sideways"], "passes"),
        (["--peers", "torch"], "peers"),
        (["--peers", "none", "fla"], "peers"),
        (["--seconds", "0"], "seconds"),
        (["--gate-normalizer", "-1"], "gate_normalizer"),
        (["--peer-timeout", "0"], "peer_timeout"),
    ],
)
def test_impossible_value_is_named(tmp_path, capsys, arguments, named):
    assert named in error_of(kernels.main, [*arguments, "--output", str(tmp_path)], capsys)
    assert list(tmp_path.iterdir()) == []


def test_shapes_depend_on_the_device():
    cases = kernels.cases_of(kernels.KernelsConfig(decays=("channel", "none")))
    assert [(case.name, case.decay) for case in cases] == [
        ("tiny", "channel"),
        ("tiny-wide", "channel"),
        ("tiny", "none"),
        ("tiny-wide", "none"),
    ]


@pytest.mark.parametrize(
    ("decay", "forward", "gradient"),
    [
        # q, k, v, out and gates; then those and dout in their place, and dq, dk, dv, dgates on top.
        ("channel", 4 * KEYS + 4 * VALUES + 4 * KEYS, 4 * KEYS + 2 * VALUES + 4 * KEYS),
        ("token", 4 * KEYS + 4 * VALUES + 4 * 8, 4 * KEYS + 2 * VALUES + 4 * 8),
        ("head", 4 * KEYS + 4 * VALUES + 4 * 2, 4 * KEYS + 2 * VALUES),
        ("none", 4 * KEYS + 4 * VALUES, 4 * KEYS + 2 * VALUES),
    ],
)
def test_bytes_counted_by_hand(decay, forward, gradient):
    case = Case("small", SMALL, decay)
    assert bytes_moved(case, "forward") == forward
    assert bytes_moved(case, "gradient") == 2 * forward + gradient


def test_operations_counted_by_hand():
    # 8 tokens and heads; K V = 128; chunks of 64 tokens, half of whose scores are needed.
    forward = 8 * (4 * 128 + 64 * (8 + 16))
    assert operations(SMALL, "forward") == forward
    assert operations(SMALL, "gradient") == forward + 8 * (10 * 128 + 64 * (3 * 8 + 2 * 16))


def test_floor_is_the_longer_time():
    case = Case("small", SMALL, "none")
    assert floor_of(case, "forward", Rates(768.0, 1e9)) == Floor(1.0, "bytes")
    assert floor_of(case, "forward", Rates(1e9, 8192.0)) == Floor(2.0, "operations")


@pytest.mark.parametrize("decay", ["channel", "token", "head", "none"])
def test_inputs_of_the_comparison(decay):
    case = Case("tiny", SHAPES["tiny"], decay, gate_normalizer=2.0)
    arrays = check_arrays(case)
    assert {name: x.shape for name, x in arrays.items() if name != "cotangent"} == case.array_shapes
    for name in ("q", "k", "v", "cotangent"):
        assert not np.any(arrays[name].view(np.uint32) & 0xFFFF), "bfloat16 must hold it"
        assert relative_rms(arrays[name], np.zeros_like(arrays[name]) + 1) > 0.9
    if decay in ("channel", "token"):
        # log sigmoid of a standard normal variable has mean -0.806.
        np.testing.assert_allclose(arrays["log_decay"].mean(), -0.806 / 2, rtol=0.1)
        assert arrays["log_decay"].max() < 0


WORKER = """
import json, sys, time
from pathlib import Path
import numpy as np

job, operation, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if "compile" in sys.argv:
    sys.exit()
what = json.loads(job.read_text())
with job.with_name(operation + ".jsonl").open("a") as records:
    def emit(**values):
        print(json.dumps(values), file=records, flush=True)
    emit(versions={"fla": "0"})
    for index, case in enumerate(what["cases"][operation]):
        if index < first:
            continue
        emit(case=index, started=True)
        emit(case=index, direction="forward", tuning=1.5, refused=operation == "chunk_simple_gla")
        emit(case=index, direction="forward", seconds=[4.0, 3.0, 2.0], extra_bytes=2**20)
        if index == 0:
            for given, results in case["checks"]:
                np.savez(results, out=np.load(given)["v"])
            emit(case=index, direction="forward", graph_seconds=[1.0, 2.0, 1.0])
            emit(case=index, done=True)
        else:
            print("the second case is too much", flush=True)
            END
"""


@pytest.fixture
def fla(tmp_path):
    """Measures FLA on two shapes and two decays by processes that only say so, and end as the test wants."""

    def measure(end: str, timeout: float = 60.0):
        script = tmp_path / "worker.py"
        script.write_text(WORKER.replace("END", end))
        cases = [Case(name, SHAPES[name], decay) for decay in ("token", "none") for name in ("tiny", "tiny-wide")]
        said = []
        checks = {case: [arrays for _, arrays in kernels.check_inputs(case)] for case in cases}
        results, versions = kernel_peers.measure_fla(
            cases,
            checks,
            ("forward",),
            tmp_path,
            seconds=0.1,
            timeout=timeout,
            announce=said.append,
            command=(sys.executable, str(script)),
        )
        assert versions == {"fla": "0"}
        assert "chunk_simple_gla" in said[1]
        assert "the second case is too much" in said[2]
        return checks, results

    return measure


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        pytest.param("sys.exit(9)", "its process ended with status 9: the second case is too much", id="death"),
        pytest.param("time.sleep(60)", "stopped after 3 s", id="patience"),
        pytest.param("emit(case=index, error='out of memory')", "out of memory", id="error"),
    ],
)
def test_what_one_case_of_fla_costs_the_others(fla, end, reason):
    checks, results = fla(end, timeout=3.0 if "stopped" in reason else 60.0)
    first, second, *without = results.values()
    assert first.name == second.name == "chunk_simple_gla"
    assert first.reason == ""
    assert first.seconds == {"forward": [1.0, 2.0, 1.0]}
    assert first.in_graph == {"forward"}
    assert first.refused
    np.testing.assert_array_equal(first.check_results[1]["out"], next(iter(checks.values()))[1]["v"])
    assert second.reason == reason
    assert second.seconds == {"forward": [4.0, 3.0, 2.0]}
    assert second.check_results == []
    assert all("none" in result.reason and not result.seconds for result in without)


def test_process_that_does_not_start_is_not_tried_again(tmp_path):
    script = tmp_path / "worker.py"
    start = "'compile' in sys.argv or open({!r}, 'a').write('x')".format(str(tmp_path / "starts"))
    script.write_text(f"import sys; {start}; raise ImportError('no torch')")
    cases = [Case(name, SHAPES[name], "channel") for name in ("tiny", "tiny-wide")]
    results, _ = kernel_peers.measure_fla(
        cases,
        {case: [] for case in cases},
        ("forward",),
        tmp_path,
        seconds=0.1,
        timeout=60.0,
        announce=lambda operation: None,
        command=(sys.executable, str(script)),
    )
    assert (tmp_path / "starts").read_text() == "x"
    assert all(result.reason.endswith("ImportError: no torch") for result in results.values())


def test_ratio_is_over_fla_on_the_same_case_and_pass():
    case, other = (Case(name, SHAPES[name], "token") for name in ("tiny", "tiny-wide"))
    measured = partial(kernels.Measurement, extra_bytes=0, errors={})
    ours = measured(case, "xla", "forward", Timing((3.0, 1.0, 2.0)))
    softmax = measured(case, "softmax", "forward", Timing((1.0,)), linear=False)
    slow = measured(other, "chunk_simple_gla", "forward", Timing((100.0,)), ours=False)
    backward = measured(case, "chunk_simple_gla", "gradient", Timing((50.0,)), ours=False)
    fla = measured(case, "chunk_simple_gla", "forward", Timing((8.0,)), ours=False)
    config = kernels.KernelsConfig(shapes=("tiny", "tiny-wide"))
    results = kernels.Results(config, Rates(1.0, 1.0), [ours, softmax, slow, backward, fla], {}, {})
    ratios = [row["over_fla"] for row in kernels.record(results)["measurements"]]
    assert ratios == [0.25, None, 1.0, 1.0, 1.0]


def test_contender_with_shapes_of_its_own_is_compiled_for_them():
    """As softmax attention is, whose heads are others."""
    case = Case("tiny", SHAPES["tiny"], "channel")
    own = Case("tiny", Shape(batch=1, tokens=8, heads=2, key_width=4, value_width=4), "none")
    other = Contender("other", own, lambda arrays: arrays["q"] * arrays["k"] * arrays["v"], linear=False)
    contenders, nothing, passes = {case: [other]}, {case: []}, ("forward", "gradient")
    with ThreadPoolExecutor(1) as pool:
        lowering = lower_all(pool, contenders, nothing, passes)
    (prepared,) = prepare(contenders, nothing, passes, lowering, lambda: None)[case]
    out, gradients = prepared.compiled["gradient"].program(*draw(own))
    assert (prepared.note, out.shape, set(gradients)) == ("", (1, 8, 2, 4), {"q", "k", "v"})
