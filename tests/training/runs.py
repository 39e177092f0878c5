"""Runs so small that compiling them is most of the work."""

import dataclasses
from pathlib import Path

from zeco_jax.training import (
    Architecture,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)

ONE_LAYER = Architecture(num_layers=1, hidden_size=32, num_heads=2)


def write_text(directory: Path, files: int = 6, lines: int = 60) -> Path:
    """A directory of text files, each of them different."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        text = "".join(f"{number}: line {line} of file {number}, {line * line % 97}\n" for line in range(lines))
        (directory / f"file-{number}.txt").write_text(text)
    return directory


def small_run(directory: Path, **changes) -> TrainConfig:
    """A run of a few steps on 8 devices, which keeps everything below `directory`."""
    config = TrainConfig(
        architecture=ONE_LAYER,
        data=DataConfig(directory=write_text(directory / "text")),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, decay_steps=100),
        mesh=MeshConfig(seq=8),
        checkpoint=CheckpointConfig(every=2),
        evaluation=EvaluationConfig(every=100, batches=1, sample_bytes=0),
        logging=LoggingConfig(every=1, tensorboard=False, progress=False),
        steps=4,
        batch_size=2,
        sequence_length=64,
        output=directory / "run",
    )
    return dataclasses.replace(config, **changes)
