import dataclasses
import io
import warnings

import numpy as np
import pytest
from rich.console import Console

from tests.training.runs import small_run
from zeco_jax.training import Architecture, DataConfig, OptimizerConfig, Summary, read_metrics, train


def losses(config):
    """All steps and losses, in the order of the file."""
    return [(record["step"], record["loss"]) for record in read_metrics(config.output / "metrics.jsonl")]


def run(config):
    """Trains and returns what was said on the way."""
    console = Console(file=io.StringIO(), width=200)
    train(config, console=console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps that nothing interrupted."""
    config = small_run(tmp_path_factory.mktemp("finished"), steps=6)
    run(config)
    return config


def test_a_run_leaves_its_reports(finished):
    assert [step for step, _ in losses(finished)] == list(range(1, 7))
    assert [record["step"] for record in read_metrics(finished.output / "validation.jsonl")] == [6]
    for name in ("loss.png", "summary.json", "config.json"):
        assert (finished.output / name).stat().st_size > 0
    summary = Summary.read(finished.output)
    assert (summary.steps, summary.tokens, summary.devices) == (6, 6 * 2 * 64, "1 x 8")
    assert summary.tokens_per_second > 0
    # No figure rather than a wrong one: the peak of a CPU isn't known.
    assert summary.model_flops_utilization is None


def test_chunks_train_as_whole_sequences_do(tmp_path, finished):
    chunks = dataclasses.replace(finished, chunk_tokens=16, mlp_block_tokens=3, output=tmp_path / "run")
    run(chunks)
    for name in ("metrics.jsonl", "validation.jsonl"):
        got, want = ([record["loss"] for record in read_metrics(c.output / name)] for c in (chunks, finished))
        np.testing.assert_allclose(got, want, rtol=1e-4)


def test_a_finished_run_is_only_reported(finished):
    before = losses(finished)
    assert "already finished: 6 steps" in run(finished)
    assert losses(finished) == before


def test_a_stopped_run_with_a_damaged_checkpoint_ends_like_the_one_that_was_not_stopped(tmp_path, finished):
    stopped = dataclasses.replace(finished, steps=4, output=tmp_path / "run")
    run(stopped)
    for path in (stopped.output / "checkpoints" / "4" / "parameters" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="checkpoint of step 4 .* is damaged"):
        said = run(dataclasses.replace(stopped, steps=6))
    assert "after step 2" in said
    # Not close: equal, each step once.
    assert losses(stopped) == losses(finished)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"architecture": Architecture(num_layers=2)}, "model.num_layers", id="model"),
        pytest.param({"seed": 1}, "seed: the checkpoint has 0, this run 1", id="seed"),
        pytest.param(
            {"optimizer": OptimizerConfig(learning_rate=1.0, warmup_steps=2)}, "optimizer.learning_rate", id="optimizer"
        ),
        pytest.param({"data": DataConfig()}, "data.checksum", id="data"),
    ],
)
def test_another_configuration_does_not_go_on_with_these_checkpoints(finished, changes, named):
    with pytest.raises(ValueError, match="another configuration") as caught:
        train(dataclasses.replace(finished, **changes))
    assert named in str(caught.value)


def test_a_run_may_go_on_with_other_cadences_and_remat(finished):
    changed = dataclasses.replace(finished, remat=True, logging=dataclasses.replace(finished.logging, every=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert "already finished" in run(changed)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    config = small_run(tmp_path, optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=0))
    with pytest.raises(FloatingPointError, match="learning-rate"):
        train(config)
    # No checkpoint is written of what has gone wrong.
    assert len(losses(config)) < 4
    assert not (config.output / "checkpoints" / "4").exists()
