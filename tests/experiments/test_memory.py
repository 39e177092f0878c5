import dataclasses
import json
import math

import pytest

from experiments import memory
from experiments.memory import GIB, Measurement, MemoryConfig, for_this_machine, run_of, search
from tests.experiments.mistakes import error_of
from zeco_jax.training import model_config


def test_writes_table_record_and_figure(tmp_path, capsys):
    options = ["--lengths", "500", "--chunk-tokens", "32", "--settings", "seco", "remat"]
    assert memory.main([*options, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "memory.json").read_text())
    rows = result["measurements"]
    # In the order in which each adds to the one before; lengths in whole chunks.
    assert [(row["setting"], row["length"]) for row in rows] == [("remat", 500), ("seco", 512)]
    assert rows[0]["compiled_bytes"] > rows[1]["compiled_bytes"] > 0
    # A CPU doesn't count.
    assert {row["peak_bytes"] for row in rows} == {None}
    assert result["config"]["model"] == "tiny"
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "Training tiny in float32 on cpu" in capsys.readouterr().out


def test_every_setting_adds_to_the_one_before():
    config = for_this_machine(MemoryConfig(chunk_tokens=32))
    plain, remat, mst, seco = (run_of(config, setting, 64) for setting in memory.SETTINGS)
    assert dataclasses.replace(plain, remat=True) == remat
    assert dataclasses.replace(remat, mlp_block_tokens="auto", loss_block_tokens=None) == mst
    assert dataclasses.replace(mst, chunk_tokens=32) == seco
    # One block that holds all tokens.
    assert (model_config(plain).mlp_block_tokens, plain.loss_block_tokens) == (64, 64)


@pytest.mark.parametrize(
    ("takes", "most", "longest"),
    [
        pytest.param(lambda length: 100 + 3 * length, 1000, 300, id="linear"),
        pytest.param(lambda length: 100 + 3 * length, 200, 200, id="ended-by-most"),
        pytest.param(lambda length: 100, 10_000, 10_000, id="constant"),
        pytest.param(lambda length: 100, 35, 30, id="ended-between-two-units"),
        pytest.param(lambda length: 3 * length if length < 250 else math.inf, 1000, 240, id="not-compiled-beyond"),
        pytest.param(lambda length: 2000, 1000, None, id="never"),
    ],
)
def test_search_ends_at_the_longest(takes, most, longest):
    assert search(takes, 20, 1000, unit=10, most=most) == longest


@pytest.mark.parametrize("power", [0.8, 1.2])
def test_search_takes_few_tries_when_growth_is_not_quite_linear(power):
    tried = []

    def takes(length):
        tried.append(length)
        return length**power

    found = search(takes, 64, 30_000, unit=8, most=10**7)
    assert 0.94 * 30_000 ** (1 / power) < found <= 30_000 ** (1 / power)
    assert len(tried) <= 8


def test_what_fits_on_paper_but_not_on_the_device_is_shortened(monkeypatch):
    config = dataclasses.replace(for_this_machine(MemoryConfig(chunk_tokens=8, lengths=(64,))), limit_gib=1000 / GIB)

    def compiled(length):
        return memory.CompiledStep(None, None, None, Measurement("plain", length, compiled_bytes=length))

    def run_step(compiled, steps):
        problem = "too much" if compiled.measured.length > 900 else None
        return dataclasses.replace(compiled.measured, problem=problem)

    monkeypatch.setattr(memory, "run_step", run_step)
    result = memory.measure_longest(config, "plain", compiled, shortest=64)
    assert result.longest
    assert 860 < result.length <= 900


def test_a_search_needs_a_limit():
    with pytest.raises(ValueError, match="limit_gib: cpu has no limit of its own"):
        for_this_machine(MemoryConfig(longest=True))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(["--lengths", "0"], "lengths", id="no-tokens"),
        pytest.param(["--chunk-tokens", "0"], "chunk_tokens", id="empty-chunks"),
        pytest.param(["--limit-gib", "-1"], "limit_gib", id="negative-limit"),
        pytest.param(["--model", "huge"], "huge", id="unknown-model"),
    ],
)
def test_impossible_value_is_named(tmp_path, capsys, arguments, named):
    assert named in error_of(memory.main, [*arguments, "--settings", "plain", "--output", str(tmp_path)], capsys)
    assert list(tmp_path.iterdir()) == []
