"""Training throughput of a model as sequences grow: `python -m experiments.throughput`.

    python -m experiments.throughput                                   340m at 8k, 32k and 128k tokens on one GPU or TPU
    python -m experiments.throughput --model 1b --lengths 32768 --tokens-per-step 32768
    python -m experiments.throughput --model 1b --lengths 32768 --remat-saves products --scan-unroll 24    the fastest
    python -m experiments.throughput --seq 8 --backend xla --no-remat  sequences cut over 8 devices
    python -m experiments.throughput --data 8                          whole sequences on each of them

The steps are those of `experiments.train`: forward, backward, AdamW, on random tokens and without files. A length that
doesn't fit in memory gets a row that says so; 95 % of a GPU's memory are used, unless XLA_CLIENT_MEM_FRACTION says
otherwise.

Prints a table and writes throughput.json and throughput.png.
"""

import contextlib
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.command_line import run_program
from experiments.measuring import Timing, spread
from experiments.results_files import conditions, write_results
from zeco_jax.models import ModelConfig, named_config
from zeco_jax.pods import memory_use
from zeco_jax.training import (
    Architecture,
    Batch,
    DeviceConfig,
    MeshConfig,
    TrainConfig,
    compile_program,
    make_mesh,
    model_config,
    model_flops_per_token,
    model_flops_utilization,
    place,
    prepare_devices,
)

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
WARM_UP = 2


@dataclass(frozen=True)
class ThroughputConfig:
    """What is measured, and where the results go."""

    model: str | None = None
    """Name of a model; None: 340m, on CPUs tiny."""
    lengths: tuple[int, ...] | None = None
    """Tokens per sequence; None: 8192, 32768 and 131072, on CPUs 256 and 1024."""
    tokens_per_step: int | None = None
    """Tokens of a step's sequences together, at least one sequence; None: 65536, on CPUs 1024."""
    seq: int = 1
    """Devices among which every sequence is divided."""
    data: int = 1
    """Groups of so many devices, among which the sequences are divided."""
    schedule: str | None = None
    """How states travel, as in zeco_jax.linear_attention."""
    backend: str | None = None
    """As in zeco_jax.linear_attention."""
    remat: bool = True
    """Recompute each layer in the backward pass instead of storing its activations."""
    remat_saves: Literal["attention", "products"] = "attention"
    """What is stored nevertheless: the outputs of attention, or the results of all matrix products."""
    scan_unroll: int = 1
    """How many layers are compiled as one piece, a divisor of their number: more compile longer and may run faster."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Type that the model computes in; None: bfloat16, on CPUs float32."""
    steps: int = 5
    """Timed steps."""
    output: Path = RESULTS
    """Directory for throughput.json and throughput.png."""

    def __post_init__(self) -> None:
        if self.model is not None:
            named_config(self.model)
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise ValueError(f"lengths must be positive numbers, got {self.lengths}")
        for name in ("tokens_per_step", "seq", "data", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def devices(self) -> int:
        """How many work together."""
        return self.data * self.seq


@dataclass(frozen=True)
class Measurement:
    """One length.

    Attributes:
        length: tokens per sequence.
        batch: sequences per step.
        seconds: of a step: first quartile, median, third quartile; None if the step doesn't fit in memory.
        tokens_per_second: of all devices, from the median.
        tokens_per_second_per_device: the same, divided by the number of devices.
        model_flops_utilization: see `zeco_jax.training.model_flops_utilization`.
        compiled_bytes: of each device's memory, that the compiled step takes; None if compiling took too much.
        peak_bytes: most that the first device ever had in use, lengths measured before included; None where JAX
            doesn't count.
        problem: what was said about memory.
    """

    length: int
    batch: int
    seconds: tuple[float, float, float] | None = None
    tokens_per_second: float | None = None
    tokens_per_second_per_device: float | None = None
    model_flops_utilization: float | None = None
    compiled_bytes: int | None = None
    peak_bytes: int | None = None
    problem: str | None = None


def runs(config: ThroughputConfig) -> list[TrainConfig]:
    """The training runs to measure, from the shortest sequence, with this machine's defaults.

    Raises:
        ValueError: an impossible run, before any has been measured.
    """
    if config.devices > jax.device_count():
        raise ValueError(f"data x seq: {config.devices} devices asked for, {jax.device_count()} here")
    small = jax.default_backend() == "cpu"
    tokens = config.tokens_per_step or (1024 if small else 65536)
    lengths = config.lengths or ((256, 1024) if small else (8192, 32768, 131072))
    return [
        TrainConfig(
            model=config.model or ("tiny" if small else "340m"),
            architecture=Architecture(backend=config.backend, schedule=config.schedule),
            mesh=MeshConfig(data=config.data, seq=config.seq),
            batch_size=max(1, tokens // length),
            sequence_length=length,
            precision=config.precision or ("float32" if small else "bfloat16"),
            remat=config.remat,
            remat_saves=config.remat_saves,
            scan_unroll=config.scan_unroll,
        )
        for length in sorted(set(lengths))
    ]


def random_batch(run: TrainConfig, model: ModelConfig) -> Batch:
    """Random tokens, each sequence one document."""
    shape = (run.batch_size, run.sequence_length)
    tokens = np.random.default_rng(run.seed).integers(model.vocabulary_size, size=(2, *shape), dtype=np.int32)
    return Batch(tokens[0], tokens[1], segment_ids=np.zeros(shape, np.int32), mask=np.ones(shape, bool))


def step_seconds(train: Callable[[Any, Batch], tuple[Any, Any]], state: Any, batch: Batch, steps: int) -> Timing:
    """Times of training steps, after some that don't count.

    Each step starts when the one before has ended. The host could have it waiting by then, which hides about a
    millisecond; but a GPU takes no more than some thousand kernels ahead, so that the host stands still in the middle
    of a long step and can't say when the one before it ended.
    """
    seconds = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train(state, batch))
        seconds.append(time.perf_counter() - start)
    return Timing(tuple(seconds[WARM_UP:]))


def measure(run: TrainConfig, steps: int) -> Measurement:
    """Compiles and times the training step of one length.

    Raises:
        jax.errors.JaxRuntimeError: of another kind than too little memory.
    """
    mesh = make_mesh(run.mesh)
    device = mesh.devices.flat[0]
    program = compile_program(run, mesh)
    compiled_bytes = seconds = rate = utilization = problem = None
    try:
        batch = place(random_batch(run, program.model), mesh)
        step = program.train.lower(program.abstract_state(), batch).compile()
        compiled_bytes = memory_use(step).total
        timing = step_seconds(step, program.create(), batch, steps)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = str(error).splitlines()[0]
    else:
        seconds = spread(timing)
        rate = run.batch_size * run.sequence_length / timing.median
        utilization = model_flops_utilization(
            program.model,
            rate,
            devices=mesh.size,
            device_kind=device.device_kind,
            sequence_length=run.sequence_length,
        )
    return Measurement(
        length=run.sequence_length,
        batch=run.batch_size,
        seconds=seconds,
        tokens_per_second=rate,
        tokens_per_second_per_device=rate and rate / mesh.size,
        model_flops_utilization=utilization,
        compiled_bytes=compiled_bytes,
        peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
        problem=problem,
    )


def measure_all(config: ThroughputConfig, console: Console) -> list[Measurement]:
    """All lengths, from the shortest, under a progress bar."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        return [measure(run, config.steps) for run in progress.track(runs(config), description="lengths measured")]


def table(config: ThroughputConfig, measurements: Sequence[Measurement]) -> Table:
    """One row per length."""
    run = runs(config)[0]
    devices = f"{config.devices} x {jax.devices()[0].device_kind}"
    remat = f"rematerialisation that saves {config.remat_saves}" if config.remat else "no rematerialisation"
    result = Table(title=f"Training {run.model} in {run.precision} with {remat} on {devices}")
    # Two lines each, so that the table fits 80 columns.
    headings = ["tokens x\nsequences", "step, ms\n(quartiles)", "tokens/s", "MFU", "compiled,\nGiB", "peak,\nGiB"]
    if config.devices > 1:
        headings.insert(3, "per\ndevice")
    for heading in headings:
        result.add_column(heading, justify="right")
    for m in measurements:
        step, rates, utilization = "doesn't fit", [m.tokens_per_second], ""
        if m.seconds is not None:
            low, median, high = (1e3 * value for value in m.seconds)
            step = f"{median:,.0f} ({low:,.0f}-{high:,.0f})"
        if m.model_flops_utilization is not None:
            utilization = f"{100 * m.model_flops_utilization:.1f} %"
        if config.devices > 1:
            rates.append(m.tokens_per_second_per_device)
        speed = ["" if rate is None else f"{rate:,.0f}" for rate in rates]
        memory = ["" if size is None else f"{size / GIB:.2f}" for size in (m.compiled_bytes, m.peak_bytes)]
        result.add_row(f"{m.length:,} x {m.batch}", step, *speed, utilization, *memory)
    return result


def record(config: ThroughputConfig, measurements: Sequence[Measurement]) -> dict[str, object]:
    """What throughput.json holds."""
    run = runs(config)[0]
    chosen = {name: getattr(run, name) for name in ("model", "precision", "remat", "remat_saves", "scan_unroll")}
    shared = conditions(config)
    return shared | {
        "config": shared["config"] | chosen,
        "model_flops_per_token": model_flops_per_token(model_config(run), run.sequence_length),
        "quartiles": "seconds of a step: first quartile, median, third quartile",
        "measurements": [asdict(measurement) for measurement in measurements],
    }


def draw(config: ThroughputConfig, measurements: Sequence[Measurement], path: Path) -> None:
    """Tokens per second and device over the length, with quartiles."""
    from matplotlib.figure import Figure

    fitting = [m for m in measurements if m.seconds is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if fitting:
        lengths = [m.length for m in fitting]
        slow, median, fast = (
            [m.batch * m.length / m.seconds[quartile] / config.devices for m in fitting] for quartile in (2, 1, 0)
        )
        (line,) = axes.plot(lengths, median, marker="o")
        axes.fill_between(lengths, slow, fast, alpha=0.15, color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.1 * max(fast))
    axes.set(xlabel="tokens per sequence", ylabel="tokens/s per device")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(table(config, measurements).title, 70))
    figure.savefig(path, dpi=120)


def report(config: ThroughputConfig) -> None:
    """Measures, prints the table, writes the files."""
    console = Console()
    prepare_devices(DeviceConfig(memory_fraction=0.95))
    # Refused once JAX has started; the devices are then what they are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", config.devices)
    config.output.mkdir(parents=True, exist_ok=True)
    measurements = measure_all(config, console)
    console.print(table(config, measurements))
    for m in measurements:
        if m.problem is not None:
            console.print(f"{m.length:,} x {m.batch}: {m.problem}", highlight=False, markup=False)
    stem = config.output / "throughput"
    write_results(stem, record(config, measurements), partial(draw, config, measurements), console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the training step as sequences grow; see `run_program`."""
    return run_program("throughput", ThroughputConfig, report, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
