"""The ready-made runs, by name."""

from dataclasses import replace
from pathlib import Path

from experiments.configs.run import RunConfig
from zeco_jax.training import (
    CheckpointConfig,
    DeviceConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)


def _tiny_cpu() -> RunConfig:
    """Minutes on a laptop: every sequence is cut over 8 virtual devices."""
    return RunConfig(
        training=TrainConfig(
            model="tiny",
            mesh=MeshConfig(seq=8),
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20),
            checkpoint=CheckpointConfig(every=50),
            evaluation=EvaluationConfig(every=150, batches=32),
            steps=450,
            batch_size=1,
            sequence_length=1024,
            output=Path("runs/tiny"),
        ),
        devices=DeviceConfig(virtual_devices=8),
    )


def _gpu_340m() -> RunConfig:
    """The 340m model in bfloat16 on one GPU of 40 GB.

    `--remat-saves attention --scan-unroll 1` takes half as much and compiles sooner, at four fifths of the speed.
    """
    return RunConfig(
        training=TrainConfig(
            model="340m",
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=100),
            checkpoint=CheckpointConfig(every=500, keep=2),
            evaluation=EvaluationConfig(every=500, batches=8),
            steps=2000,
            batch_size=8,
            sequence_length=4096,
            precision="bfloat16",
            remat=True,
            remat_saves="products",
            scan_unroll=24,
            output=Path("runs/340m"),
        ),
    )


def _gpu_1b() -> RunConfig:
    """The 1b model in bfloat16 on one GPU of 80 GB, of which a step takes 64.

    `--remat-saves attention --scan-unroll 1` takes half as much and compiles sooner, at four fifths of the speed.
    """
    return RunConfig(
        training=TrainConfig(
            model="1b",
            optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=100),
            # One of them has 16 GB.
            checkpoint=CheckpointConfig(every=500, keep=1),
            evaluation=EvaluationConfig(every=500, batches=8),
            steps=2000,
            batch_size=1,
            sequence_length=32768,
            precision="bfloat16",
            remat=True,
            remat_saves="products",
            scan_unroll=24,
            output=Path("runs/1b"),
        ),
        devices=DeviceConfig(memory_fraction=0.95),
    )


def _gpu_1b_long() -> RunConfig:
    """The 1b model on sequences of 131072 tokens, one GPU of 80 GB: little is kept, the MLPs go block by block."""
    run = _gpu_1b()
    training = replace(
        run.training,
        sequence_length=131072,
        remat_saves="attention",
        scan_unroll=1,
        mlp_block_tokens="auto",
        output=Path("runs/1b-long"),
    )
    return replace(run, training=training)


_RUNS = {"tiny-cpu": _tiny_cpu, "340m-gpu": _gpu_340m, "1b-gpu": _gpu_1b, "1b-long-gpu": _gpu_1b_long}


def run_names() -> tuple[str, ...]:
    """Names of the ready-made runs; the first is what `python -m experiments.train` does by itself."""
    return tuple(_RUNS)


def named_run(name: str) -> RunConfig:
    """The ready-made run of that name.

    Args:
        name: One of `run_names()`.

    Returns:
        The run.

    Raises:
        ValueError: There is none of that name.

    Example:
        >>> from experiments.configs import named_run
        >>> named_run("tiny-cpu").training.mesh.seq
        8
    """
    if name not in _RUNS:
        raise ValueError(f"config: got {name!r}, expected one of {', '.join(_RUNS)}")
    return _RUNS[name]()
