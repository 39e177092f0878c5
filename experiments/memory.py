"""Memory of a training step against the length of the sequence: `python -m experiments.memory`.

    python -m experiments.memory                                 340m on one GPU or TPU, tiny on a CPU
    python -m experiments.memory --longest                       and the longest sequence that fits, tokens/s there
    python -m experiments.memory --settings mst seco --chunk-tokens 16384

Four settings, each of which adds something to the one before:

    plain   whole sequences, all activations kept
    remat   layers computed again in the backward pass
    mst     feed-forward layers, LM head and loss in blocks of tokens (mini-sequences, arXiv 2407.15892)
    seco    one chunk of the sequence after the other, the state carried over (SeCO, arXiv 2505.16710)

One sequence a step, forward, backward and AdamW. The compiler's figure is what it sets aside for the whole step; on a
device that counts its memory the step also runs, for the real peak and tokens/s. Every setting has a process of its
own and goes from the shortest sequence to the longest, so no peak is another's. JAX may use 95 % of a GPU's memory
unless XLA_CLIENT_MEM_FRACTION says otherwise.

Prints a table and writes memory.json and memory.png.
"""

import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.command_line import run_program
from experiments.results_files import write_results
from experiments.throughput import GIB, random_batch, step_seconds
from zeco_jax.models import named_config
from zeco_jax.pods import memory_use
from zeco_jax.training import (
    Architecture,
    Batch,
    DeviceConfig,
    MeshConfig,
    Program,
    TrainConfig,
    compile_program,
    make_mesh,
    place,
    prepare_devices,
)

RESULTS = Path(__file__).parent / "results"
Setting = Literal["plain", "remat", "mst", "seco"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)


@dataclass(frozen=True)
class MemoryConfig:
    """What is measured, and where the results go."""

    model: str | None = None
    """Name of a model; None: 340m, on CPUs tiny."""
    lengths: tuple[int, ...] | None = None
    """Tokens of the sequence; None: 8192, 16384 and 32768, on CPUs 512, 1024 and 2048."""
    settings: tuple[Setting, ...] = SETTINGS
    """Which of the four."""
    chunk_tokens: int | None = None
    """Tokens of a chunk; None: 8192, on CPUs 256. "seco" rounds lengths up to whole chunks."""
    longest: bool = False
    """Look for the longest sequence that fits."""
    limit_gib: float | None = None
    """Memory that it has to fit in; None: what JAX may use of the device. Needed on CPUs, which have no limit."""
    most_tokens: int = 1 << 19
    """Where the search ends if memory doesn't end it."""
    backend: str | None = None
    """As in zeco_jax.linear_attention."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Type that the model computes in; None: bfloat16, on CPUs float32."""
    steps: int = 2
    """Timed steps."""
    output: Path = RESULTS
    """Directory for memory.json and memory.png."""

    def __post_init__(self) -> None:
        if self.model is not None:
            named_config(self.model)
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise ValueError(f"lengths must be positive numbers, got {self.lengths}")
        if not self.settings:
            raise ValueError(f"settings must be some of {', '.join(SETTINGS)}, got none")
        for name in ("chunk_tokens", "limit_gib", "most_tokens", "steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class Measurement:
    """One setting at one length.

    Attributes:
        setting: see the head of this module.
        length: tokens of the sequence.
        compiled_bytes: what the compiled step takes of the device's memory; None if compiling took too much.
        peak_bytes: most that the device had in use up to here; None where JAX doesn't count or the step didn't run.
        tokens_per_second: from the median of the timed steps.
        longest: whether this is the longest sequence that fits, or the longest that was tried.
        problem: what was said about memory.
    """

    setting: Setting
    length: int
    compiled_bytes: int | None = None
    peak_bytes: int | None = None
    tokens_per_second: float | None = None
    longest: bool = False
    problem: str | None = None


class CompiledStep(NamedTuple):
    """A training step of one length: what it needs to run, and what the compiler says of it.

    Attributes:
        program: the run's functions.
        batch: random tokens.
        step: the compiled step; None if compiling took too much.
        measured: without what only running tells.
    """

    program: Program
    batch: Batch
    step: jax.stages.Compiled | None
    measured: Measurement


class SettingResult(NamedTuple):
    """What the process of a setting hands back.

    Attributes:
        device_kind: what JAX calls the device.
        platform: its kind.
        config: the configuration with the defaults of the machine.
        measurements: from the shortest length, the longest that fits at the end.
    """

    device_kind: str
    platform: str
    config: MemoryConfig
    measurements: list[Measurement]


def for_this_machine(config: MemoryConfig) -> MemoryConfig:
    """The configuration with this machine's defaults.

    Raises:
        ValueError: a search without a limit.
    """
    device = jax.devices()[0]
    small = device.platform == "cpu"
    chunk = config.chunk_tokens or (256 if small else 8192)
    lengths = config.lengths or ((512, 1024, 2048) if small else (8192, 16384, 32768))
    limit = config.limit_gib
    if limit is None and config.longest:
        limit = (device.memory_stats() or {}).get("bytes_limit", 0) / GIB
        if not limit:
            raise ValueError(f"limit_gib: {device.device_kind} has no limit of its own, got none, expected one")
    return replace(
        config,
        model=config.model or ("tiny" if small else "340m"),
        lengths=tuple(sorted(set(lengths))),
        chunk_tokens=chunk,
        limit_gib=limit,
        precision=config.precision or ("float32" if small else "bfloat16"),
    )


def run_of(config: MemoryConfig, setting: Setting, length: int) -> TrainConfig:
    """The training run of one setting; `config` has no defaults left."""
    level = SETTINGS.index(setting)
    return TrainConfig(
        model=config.model,
        architecture=Architecture(backend=config.backend),
        batch_size=1,
        sequence_length=length,
        precision=config.precision,
        remat=level >= SETTINGS.index("remat"),
        # A block of the whole length is no block.
        mlp_block_tokens="auto" if level >= SETTINGS.index("mst") else length,
        loss_block_tokens=None if level >= SETTINGS.index("mst") else length,
        chunk_tokens=config.chunk_tokens if setting == "seco" else None,
    )


def compile_step(config: MemoryConfig, setting: Setting, length: int) -> CompiledStep:
    """Compiles the step of one length.

    Raises:
        jax.errors.JaxRuntimeError: of another kind than too little memory.
    """
    run = run_of(config, setting, length)
    mesh = make_mesh(MeshConfig())
    program = compile_program(run, mesh)
    batch = place(random_batch(run, program.model), mesh, run.chunk_tokens)
    try:
        step = program.train.lower(program.abstract_state(), batch).compile()
    except jax.errors.JaxRuntimeError as error:
        return CompiledStep(program, batch, None, Measurement(setting, length, problem=too_little_memory(error)))
    return CompiledStep(program, batch, step, Measurement(setting, length, memory_use(step).total))


def run_step(compiled: CompiledStep, steps: int) -> Measurement:
    """Runs a step where the device counts its memory.

    Raises:
        jax.errors.JaxRuntimeError: of another kind than too little memory.
    """
    device = jax.devices()[0]
    if compiled.step is None or device.memory_stats() is None:
        return compiled.measured
    try:
        timing = step_seconds(compiled.step, compiled.program.create(), compiled.batch, steps)
    except jax.errors.JaxRuntimeError as error:
        return replace(compiled.measured, problem=too_little_memory(error))
    return replace(
        compiled.measured,
        peak_bytes=device.memory_stats()["peak_bytes_in_use"],
        tokens_per_second=compiled.measured.length / timing.median,
    )


def too_little_memory(error: jax.errors.JaxRuntimeError) -> str:
    """What was said about memory; raises the error if it speaks of something else."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return str(error).splitlines()[0]


def search(takes: Callable[[int], float], shortest: int, limit: float, *, unit: int, most: int) -> int | None:
    """The longest length that stays below a limit, for a quantity that grows about linearly: few lengths are tried.

    Args:
        takes: the quantity at a length.
        shortest: length to start from.
        limit: most that it may be.
        unit: lengths are multiples of it.
        most: longest length to try.

    Returns:
        A length that fits, where the line through the last two tried leaves room for less than 1 / 32 more; None if
        the shortest doesn't fit.

    Example:
        >>> search(lambda length: 100 + 3 * length, 10, 1000, unit=10, most=1000)
        300
    """
    fits, value, too_long = shortest, takes(shortest), most + 1
    if value > limit:
        return None
    guess = min(2 * shortest, most) // unit * unit
    while guess > fits * 33 / 32:
        reached = takes(guess)
        growth = (reached - value) / (guess - fits)
        if reached > limit:
            too_long = guess
        else:
            fits, value = guess, reached
        # What took too much to be compiled has no figure to draw a line to.
        room = (too_long - fits) / 2 if math.isinf(growth) else (limit - value) / max(growth, 1e-9)
        guess = int(min(fits + room, too_long - 1)) // unit * unit
    return fits


def measure_setting(config: MemoryConfig, setting: Setting) -> SettingResult:
    """All lengths of a setting, from the shortest, and the longest that fits; for a process of its own."""
    config = for_this_machine(config)
    compiled = cache(partial(compile_step, config, setting))
    unit = config.chunk_tokens if setting == "seco" else 1
    lengths = sorted({-(-length // unit) * unit for length in config.lengths})
    measurements = [run_step(compiled(length), config.steps) for length in lengths]
    if config.longest:
        measurements.append(measure_longest(config, setting, compiled, shortest=lengths[0]))
    device = jax.devices()[0]
    return SettingResult(device.device_kind, device.platform, config, measurements)


def measure_longest(
    config: MemoryConfig, setting: Setting, compiled: Callable[[int], CompiledStep], *, shortest: int
) -> Measurement:
    """Looks for the longest sequence that fits by the compiler's figure and runs it, or a shorter one if it must be."""

    def takes(length: int) -> float:
        size = compiled(length).measured.compiled_bytes
        return math.inf if size is None else size

    unit = search_unit(config, setting)
    length = search(takes, shortest, config.limit_gib * GIB, unit=unit, most=config.most_tokens)
    while length is not None and length >= shortest:
        result = run_step(compiled(length), config.steps)
        if result.problem is None:
            return replace(result, longest=True)
        length -= max(unit, length // 32 // unit * unit)
    return replace(compiled(shortest).measured, longest=True, problem="the shortest sequence doesn't fit")


def search_unit(config: MemoryConfig, setting: Setting) -> int:
    """What the lengths that are tried are multiples of."""
    return config.chunk_tokens if setting == "seco" else max(1, config.chunk_tokens // 8)


def measure_all(config: MemoryConfig, console: Console) -> list[SettingResult]:
    """All settings under a progress bar, each in a new process.

    Raises:
        ValueError: an impossible configuration, or a process that ended before its time.
    """
    results = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    settings = [setting for setting in SETTINGS if setting in config.settings]
    with Progress(*columns, console=console) as progress:
        for setting in progress.track(settings, description="settings measured"):
            # A fork would share JAX's threads and memory.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                try:
                    results.append(process.submit(measure_setting, config, setting).result())
                except BrokenProcessPool as error:
                    raise ValueError(f"settings: the process of {setting!r} was killed; too little memory?") from error
    return results


def table(results: Sequence[SettingResult]) -> Table:
    """One row per setting and length, the longest last."""
    config = results[0].config
    result = Table(title=f"Training {config.model} in {config.precision} on {results[0].device_kind}, one sequence")
    for heading in ("setting", "tokens", "compiled, GiB", "peak, GiB", "tokens/s"):
        result.add_column(heading, justify="left" if heading == "setting" else "right")
    for setting in results:
        for m in setting.measurements:
            memory = ["" if size is None else f"{size / GIB:.2f}" for size in (m.compiled_bytes, m.peak_bytes)]
            speed = "" if m.tokens_per_second is None else f"{m.tokens_per_second:,.0f}"
            length = f"{m.length:,}"
            if m.longest:
                ended = m.length + search_unit(config, m.setting) > config.most_tokens
                length = f"{'at least' if ended else 'longest'} {length}"
            result.add_row(m.setting, length, *memory, speed if m.problem is None else "doesn't fit")
        result.add_section()
    return result


def record(results: Sequence[SettingResult]) -> dict[str, object]:
    """What memory.json holds."""
    first = results[0]
    config = asdict(first.config)
    del config["output"]
    return {
        "config": config,
        "device": {"kind": first.device_kind, "platform": first.platform},
        "jax": jax.__version__,
        "measurements": [asdict(m) for setting in results for m in setting.measurements],
    }


def draw(results: Sequence[SettingResult], path: Path) -> None:
    """Memory over the length, one line per setting; crosses are what the device counted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for setting in results:
        points = sorted((m.length, m.compiled_bytes / GIB) for m in setting.measurements if m.compiled_bytes)
        peaks = sorted((m.length, m.peak_bytes / GIB) for m in setting.measurements if m.peak_bytes)
        (line,) = axes.plot(*np.reshape(points, (-1, 2)).T, marker="o", label=setting.measurements[0].setting)
        axes.plot(*np.reshape(peaks, (-1, 2)).T, "x", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="tokens of the sequence", ylabel="memory of a training step, GiB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(table(results).title)
    figure.savefig(path, dpi=120)


def report(config: MemoryConfig) -> None:
    """Measures, prints the table, writes the files."""
    console = Console()
    # For the processes that this one starts.
    prepare_devices(DeviceConfig(memory_fraction=0.95))
    config.output.mkdir(parents=True, exist_ok=True)
    results = measure_all(config, console)
    console.print(table(results))
    for m in (m for setting in results for m in setting.measurements if m.problem is not None):
        console.print(f"{m.setting}, {m.length:,}: {m.problem}", highlight=False, markup=False)
    write_results(config.output / "memory", record(results), partial(draw, results), console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the memory of training steps; see `run_program`."""
    return run_program("memory", MemoryConfig, report, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
