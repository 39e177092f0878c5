import dataclasses
import json

import numpy as np
import pytest

from experiments import exposure, operators
from tests.experiments.mistakes import error_of

SMALL = ["--tokens-per-rank", "16", "--heads", "2", "--key-width", "4", "--value-width", "4", "--chunk-size", "16"]
QUICK = [*SMALL, "--devices", "2", "--seconds", "0.01"]


def test_writes_tables_record_and_figure(tmp_path, capsys):
    strategies = ["--strategies", "loopback", "chain", "ulysses"]
    assert operators.main([*QUICK, *strategies, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "operators.json").read_text())["measurements"]
    assert [(row["ranks"], row["strategy"]) for row in rows] == [
        (2, strategy) for strategy in ("none", "loopback", "chain", "ulysses")
    ]
    for row in rows:
        for name in ("forward", "gradient"):
            low, median, high = row[name]
            assert 0 < low <= median <= high
            assert row[f"{name}_ratio"] == 1 if row["strategy"] == "none" else row[f"{name}_ratio"] > 0
    assert (tmp_path / "operators.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "113.71" in printed
    assert "ulysses" in printed


def test_several_numbers_of_ranks_are_drawn_over_ranks(tmp_path):
    measured = operators.Measurement(1, "none", None, (1.0, 1.0, 1.0), (3.0, 3.0, 3.0), 1.0, 1.0)
    rows = [dataclasses.replace(measured, ranks=ranks) for ranks in (1, 2, 4)]
    config = operators.OperatorsConfig()
    for name, some in (("one", rows[:1]), ("several", rows)):
        operators.draw(config, some, tmp_path / f"{name}.png")
    figures = [(tmp_path / f"{name}.png").read_bytes() for name in ("one", "several")]
    assert all(figure.startswith(b"\x89PNG") for figure in figures)
    assert figures[0] != figures[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--devices", "0"], "devices"),
        (["--devices", "4096"], "devices"),
        (["--tokens-per-rank", "0"], "tokens_per_rank"),
        (["--seconds", "0"], "seconds"),
        (["--backend", "cuda", "--devices", "1"], "backend"),
        (["--backend", "hopper", "--devices", "1"], "backend 'hopper' can't serve this call"),
        (["--strategies", "teleport"], "strategies"),
    ],
)
def test_impossible_value_is_named(tmp_path, capsys, arguments, named):
    assert named in error_of(operators.main, [*SMALL, *arguments, "--output", str(tmp_path)], capsys)
    assert list(tmp_path.iterdir()) == []


def test_strategies_that_cannot_run_are_left_out():
    config = operators.OperatorsConfig(heads=6, strategies=("ulysses", "chain", "loopback"))
    assert operators.strategies_on(4, config) == ["none", "loopback", "chain"]
    assert operators.strategies_on(2, config) == ["none", "loopback", "chain", "ulysses"]
    assert operators.strategies_on(1, config) == ["none", "loopback"]


def test_ranks_are_sorted():
    assert operators.numbers_of_ranks(operators.OperatorsConfig(devices=(2, 1, 2))) == [1, 2]


class Named:
    """A plane, line or event of a trace, as the profiler's Python interface shows it."""

    def __init__(self, name, **fields):
        self.name = name
        self.__dict__.update(fields)


def event(name, start, duration):
    return Named(name, start_ns=start, duration_ns=duration)


def test_exposure_is_what_no_other_kernel_covers():
    def device(number, waits):
        compute = [event("gemm", 0, 100), event("loop_fusion", 150, 50)]
        exchange = [event("ncclDevKernel_SendRecv", 80, waits)]
        lines = [
            Named("Stream #1(Compute)", events=compute),
            Named("Stream #2", events=exchange),
            Named("XLA Modules", events=[event("jit_f", 0, 1000)]),
        ]
        return Named(f"/device:GPU:{number}", lines=lines)

    host = Named("/host:CPU", lines=[Named("Stream of thoughts", events=[event("nccl", 0, 9999)])])
    profile = Named("profile", planes=[host, device(0, 20), device(1, 100)])
    # The second device's exchange runs from 80 to 180; nothing else does between 100 and 150.
    np.testing.assert_allclose(exposure.exposure_in(profile, runs=2), [100e-9 / 2, 50e-9 / 2, 0])


def test_trace_without_kernels_is_refused():
    with pytest.raises(ValueError, match="profile"):
        exposure.exposure_in(Named("profile", planes=[]))


@pytest.mark.gpu
def test_exposure_of_a_program_without_exchange():
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1024, 1024))
    run = jax.jit(lambda x: x @ x)
    run(x)
    assert exposure.measure_exposure(lambda: run(x), runs=2) == (0, 0, 0)
