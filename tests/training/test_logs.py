import json

import pytest

from zeco_jax.training import MetricsFile, RunLogs, read_metrics


def write(path, steps, resume_step=0):
    with MetricsFile(path, resume_step) as metrics:
        for step in steps:
            metrics.write({"step": step, "loss": float(step)})


def steps_in(path):
    return [record["step"] for record in read_metrics(path)]


@pytest.mark.parametrize("resume_step", [0, 1, 3, 5, 9])
def test_a_resumed_file_has_every_step_once(tmp_path, resume_step):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    write(path, range(min(resume_step, 5) + 1, 10), resume_step)
    assert steps_in(path) == list(range(1, 10))


def test_a_line_that_was_cut_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    whole = path.read_text()
    path.write_text(whole[:-9])
    write(path, [3], resume_step=2)
    assert path.read_text() == whole


def test_a_record_is_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as metrics:
        metrics.write({"step": 1})
        assert steps_in(path) == [1]


def test_missing_steps_give_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="0 of the 5 steps"), RunLogs(tmp_path, resume_step=5, tensorboard=False):
        pass


def test_other_processes_write_nothing(tmp_path):
    with RunLogs(tmp_path / "run", resume_step=0, tensorboard=True, active=False) as logs:
        logs.step({"step": 1, "loss": 1.0})
        logs.validation({"step": 1, "loss": 1.0})
        logs.flush()
    assert not (tmp_path / "run").exists()


def test_steps_and_validations_go_to_files_of_their_own(tmp_path):
    with RunLogs(tmp_path, resume_step=0, tensorboard=True) as logs:
        logs.step({"step": 1, "loss": 2.0})
        logs.validation({"step": 1, "loss": 3.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 2.0
    assert json.loads((tmp_path / "validation.jsonl").read_text())["loss"] == 3.0
    assert list((tmp_path / "tensorboard").glob("events.*"))
