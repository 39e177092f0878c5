"""Metrics on disk: one JSON object per line, cut back at a resume so that every step stands there once."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboardX import SummaryWriter


class MetricsFile:
    """A file of JSON lines, each with a "step"; steps ascend and none is there twice.

    Args:
        path: The file. What it holds is kept up to and including `resume_step`, and the rest is dropped: later steps,
            which are done again, and a line that a killed process left unfinished.
        resume_step: Last step that counts as done; 0 starts anew.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from zeco_jax.training import MetricsFile, read_metrics
        >>> path = Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> with MetricsFile(path, resume_step=0) as metrics:
        ...     metrics.write({"step": 1, "loss": 5.5})
        ...     metrics.write({"step": 2, "loss": 5.0})
        >>> with MetricsFile(path, resume_step=1) as metrics:
        ...     metrics.write({"step": 2, "loss": 4.9})
        >>> [record["loss"] for record in read_metrics(path)]
        [5.5, 4.9]
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= resume_step]
        replacement = path.with_name(path.name + ".new")
        replacement.write_text("".join(json.dumps(record) + "\n" for record in kept))
        replacement.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record.

        Args:
            record: JSON values, "step" among them.
        """
        self._file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Makes sure that all records survive the end of the process and of the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines.

    Args:
        path: The file; one that doesn't exist is empty.

    Returns:
        The records. Reading ends at a line that is not complete.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class RunLogs:
    """All files that a run writes its figures to; does nothing in processes other than the first.

    Args:
        directory: The run's output directory.
        resume_step: Last step that counts as done.
        tensorboard: Also write TensorBoard event files.
        active: Whether this process writes.
    """

    def __init__(self, directory: Path, *, resume_step: int, tensorboard: bool, active: bool = True) -> None:
        self._active = active
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._steps = MetricsFile(directory / "metrics.jsonl", resume_step)
        self._validations = MetricsFile(directory / "validation.jsonl", resume_step)
        done = len(read_metrics(directory / "metrics.jsonl"))
        if done != resume_step:
            warnings.warn(
                f"metrics.jsonl has {done} of the {resume_step} steps before the checkpoint; the curve will have a gap",
                stacklevel=2,
            )
        self._board = (
            SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)
            if tensorboard
            else None
        )

    def step(self, record: Mapping[str, Any]) -> None:
        """Logs one training step.

        Args:
            record: "step" and figures.
        """
        self._log(record, "train")

    def validation(self, record: Mapping[str, Any]) -> None:
        """Logs one validation.

        Args:
            record: "step" and figures.
        """
        self._log(record, "validation")

    def flush(self) -> None:
        """Makes sure that all that was logged survives the end of the process."""
        if self._active:
            self._steps.flush()
            self._validations.flush()
            if self._board is not None:
                self._board.flush()

    def _log(self, record: Mapping[str, Any], group: str) -> None:
        if not self._active:
            return
        (self._steps if group == "train" else self._validations).write(record)
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(f"{group}/{name}", value, record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._steps.__exit__(kind, error, trace)
            self._validations.__exit__(kind, error, trace)
            if self._board is not None:
                self._board.close()
