"""The whole operator under every strategy, tokens per rank fixed, ranks growing: `python -m experiments.operators`.

    python -m experiments.operators                                    1, 2, 4 and 8 virtual CPU devices, or all GPUs
    python -m experiments.operators --strategies none chain ulysses    some strategies
    python -m experiments.operators --tokens-per-rank 16384 --heads 16 --key-width 128 --value-width 128 \
        --dtype bfloat16 --latency-hiding both --profile               on GPUs, with exposed times from a profile

Local work is the same backend throughout; only what happens between ranks differs:

    none        each rank for itself: the same tokens per rank, no sequence parallelism
    loopback    the passes of ZeCO, but each rank gets its own state back: nothing on the wire, results meaningless
    chain, doubling, gather (LASP-2), transpose, auto    ZeCO with this schedule of All-Scan
    serial      LASP-1: ranks work one after the other
    ulysses     all-to-alls, heads over ranks

Prints a table, the paper's beside it, and writes operators.json and operators.png. On GPUs times are those of programs
started back to back.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.command_line import run_program
from experiments.exposure import Exposure, measure_exposure
from experiments.kernel_programs import RUN_SECONDS, repeated
from experiments.measuring import Timing, interleaved, milliseconds, spread
from experiments.results_files import conditions, write_results
from zeco_jax import linear_attention
from zeco_jax.attention import Call, Summary, attend, make_backend
from zeco_jax.parallel import ulysses_attention

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
Strategy = Literal["none", "loopback", "chain", "doubling", "gather", "transpose", "serial", "ulysses", "auto"]
STRATEGIES: tuple[Strategy, ...] = Strategy.__args__
AXIS = "ranks"
# ZeCO, arXiv 2507.01004: milliseconds of the operator at 16K tokens per H100, by number of GPUs.
PAPER_MILLISECONDS = {
    8: {"LASP-1": 22.59, "LASP-2": 19.39, "ZeCO": 7.32, "no SP": 6.39},
    32: {"LASP-1": 39.03, "LASP-2": 25.72, "ZeCO": 7.65, "no SP": 6.44},
    128: {"LASP-1": 113.71, "LASP-2": 35.72, "ZeCO": 9.88, "no SP": 6.12},
}


@dataclass(frozen=True)
class OperatorsConfig:
    """What is measured, and where the results go."""

    devices: tuple[int, ...] | None = None
    """Numbers of ranks; None: 1, 2, 4, ... up to all devices (8 virtual ones on a CPU)."""
    strategies: tuple[Strategy, ...] = STRATEGIES
    """Of those above; "none" is always measured."""
    tokens_per_rank: int = 512
    """Tokens of each sequence on each rank."""
    batch: int = 1
    """Sequences."""
    heads: int = 8
    """Heads; ulysses is left out where the ranks don't divide them."""
    key_width: int = 64
    """Width of a head's queries and keys."""
    value_width: int = 64
    """Width of a head's values."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of queries, keys and values; gates, one per key channel, are float32."""
    backend: str | None = None
    """As in zeco_jax.linear_attention."""
    chunk_size: int | None = None
    """Tokens per chunk; None: the backend's choice."""
    latency_hiding: Literal["on", "off", "both"] = "on"
    """On GPUs: XLA's latency-hiding scheduler; both compares."""
    profile: bool = False
    """On GPUs: measure exposed time in forward and backward from a profile."""
    seconds: float = 12.0
    """Time for the runs of all strategies on one number of ranks, three rounds at least."""
    output: Path = RESULTS
    """Directory for operators.json and operators.png."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_rank", "batch", "heads", "key_width", "value_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.devices is not None and (not self.devices or min(self.devices) < 1):
            raise ValueError(f"devices must be positive numbers, got {self.devices}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")


@dataclass(frozen=True)
class Measurement:
    """One strategy on one number of ranks.

    Attributes:
        ranks: number of devices.
        strategy: how the ranks work together.
        latency_hiding: whether XLA's latency-hiding scheduler was on; None on other devices than GPUs.
        forward: seconds of the forward pass: first quartile, median, third quartile.
        gradient: the same for forward and backward together.
        forward_ratio: over "none", median over rounds in which both ran.
        gradient_ratio: the same for forward and backward.
        exposure: of forward and backward; None unless profiled.
    """

    ranks: int
    strategy: Strategy
    latency_hiding: bool | None
    forward: tuple[float, float, float]
    gradient: tuple[float, float, float]
    forward_ratio: float
    gradient_ratio: float
    exposure: Exposure | None = None


@dataclass(frozen=True)
class Loopback:
    """An exchange in which each rank gets its own state back: all of ZeCO's passes, and nothing on the wire."""

    takes_turns: bool = False

    def forward(self, summary: Summary, initial_state: jax.Array) -> jax.Array:
        """The rank's own state."""
        return summary.leave(initial_state)

    def reverse(self, summary: Summary) -> jax.Array:
        """The rank's own cotangent."""
        return summary.state

    def into_initial(self, dstate_in: jax.Array) -> jax.Array:
        """Nobody asks for it."""
        return dstate_in


Arrays = dict[str, jax.Array]
Key = tuple[Strategy, bool | None, str]


def operator(strategy: Strategy, config: OperatorsConfig) -> Callable[..., jax.Array]:
    """The outputs of one rank's tokens, by the names of linear_attention's arguments."""
    options = {"backend": config.backend, "chunk_size": config.chunk_size}
    if strategy == "loopback":

        def run(**arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            call = Call.of(*(arrays[name] for name in ("q", "k", "v")))
            scale = config.key_width**-0.5
            backend = make_backend(config.backend, call, scale=scale, chunk_size=config.chunk_size)
            return attend(**arrays, backend=backend, exchange=Loopback())

    elif strategy == "ulysses":
        run = partial(ulysses_attention, axis_name=AXIS, **options)
    elif strategy == "none":
        run = partial(linear_attention, **options)
    else:
        run = partial(linear_attention, axis_name=AXIS, schedule=strategy, **options)
    return lambda arrays: run(**arrays)[0]


def functions(strategy: Strategy, config: OperatorsConfig, mesh: Mesh) -> dict[str, Callable]:
    """Forward, and forward and backward together, of whole arrays."""
    cut = PartitionSpec(None, AXIS)
    forward = jax.shard_map(operator(strategy, config), mesh=mesh, in_specs=(cut,), out_specs=cut)

    def gradient(arrays: Arrays, cotangent: jax.Array) -> tuple[jax.Array, Arrays]:
        out, pullback = jax.vjp(forward, arrays)
        return out, pullback(cotangent)[0]

    return {"forward": lambda arrays, cotangent: forward(arrays), "gradient": gradient}


def inputs(config: OperatorsConfig, mesh: Mesh) -> tuple[Arrays, jax.Array]:
    """Random arguments of linear_attention by name, and a cotangent of its output, laid out over the ranks."""
    leading = (config.batch, config.tokens_per_rank * mesh.size, config.heads)
    keys, values = (*leading, config.key_width), (*leading, config.value_width)

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec(None, AXIS)))
    def draw() -> tuple[Arrays, jax.Array]:
        seeds = jax.random.split(jax.random.key(0), 5)
        arrays = {
            "q": jax.random.normal(seeds[0], keys, config.dtype),
            "k": jax.random.normal(seeds[1], keys, config.dtype),
            "v": jax.random.normal(seeds[2], values, config.dtype),
            # As gated linear attention starts out: mild, and different for each token.
            "log_decay": jax.nn.log_sigmoid(jax.random.normal(seeds[3], keys, jnp.float32)) / 16,
        }
        return arrays, jax.random.normal(seeds[4], values, config.dtype)

    return draw()


def strategies_on(ranks: int, config: OperatorsConfig) -> list[Strategy]:
    """What there is to compare on so many ranks, "none" first."""
    wanted = [strategy for strategy in STRATEGIES if strategy in config.strategies or strategy == "none"]
    if ranks == 1:
        # The others have nobody to exchange with and are the same program as "none".
        return [strategy for strategy in wanted if strategy in ("none", "loopback")]
    return [strategy for strategy in wanted if strategy != "ulysses" or config.heads % ranks == 0]


def numbers_of_ranks(config: OperatorsConfig) -> list[int]:
    """Sorted, and none of them more than there are devices."""
    there = jax.device_count()
    if config.devices is None:
        return [1 << i for i in range(there.bit_length())]
    if max(config.devices) > there:
        raise ValueError(f"devices: {max(config.devices)} asked for, {there} here")
    return sorted(set(config.devices))


def schedulers(config: OperatorsConfig) -> list[bool | None]:
    """Settings of the latency-hiding scheduler to measure."""
    if jax.default_backend() != "gpu":
        return [None]
    return {"on": [True], "off": [False], "both": [True, False]}[config.latency_hiding]


def measure(config: OperatorsConfig, ranks: int, advance: Callable[[int], None]) -> Iterator[Measurement]:
    """Compiles all programs for `ranks` devices and times them in turns.

    Args:
        config: the operator.
        ranks: number of devices.
        advance: is told how many programs are compiled or measured.
    """
    mesh = jax.make_mesh((ranks,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:ranks])
    arguments = inputs(config, mesh)
    strategies = strategies_on(ranks, config)

    def compiled(key: Key) -> Callable[..., object]:
        strategy, latency_hiding, name = key
        options = {} if latency_hiding is None else {"xla_gpu_enable_latency_hiding_scheduler": latency_hiding}
        function = functions(strategy, config, mesh)[name]
        program = jax.jit(function).lower(*arguments).compile(options)
        advance(1)
        return program

    keys: list[Key] = [
        (strategy, latency_hiding, name)
        for strategy in strategies
        for latency_hiding in schedulers(config)
        for name in ("forward", "gradient")
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = dict(zip(keys, pool.map(compiled, keys), strict=True))
    # On GPUs a program may take less than starting it on all of them; virtual CPU devices would wait for each other.
    least = RUN_SECONDS if jax.default_backend() == "gpu" else 0.0
    timings: dict[Key, Timing] = {}
    for name, share in (("forward", 0.25), ("gradient", 0.75)):
        runs = {key: repeated(program, [arguments], least) for key, program in programs.items() if key[-1] == name}
        found = interleaved({key: run for key, (run, _) in runs.items()}, budget=share * config.seconds)
        timings |= {key: timing.divided_by(runs[key][1]) for key, timing in found.items()}
    for strategy in strategies:
        for hiding in schedulers(config):
            forward, gradient = timings[strategy, hiding, "forward"], timings[strategy, hiding, "gradient"]
            yield Measurement(
                ranks=ranks,
                strategy=strategy,
                latency_hiding=hiding,
                forward=spread(forward),
                gradient=spread(gradient),
                forward_ratio=forward.over(timings["none", hiding, "forward"]),
                gradient_ratio=gradient.over(timings["none", hiding, "gradient"]),
                exposure=(
                    measure_exposure(partial(programs[strategy, hiding, "gradient"], *arguments))
                    if config.profile
                    else None
                ),
            )
            advance(2)


def measure_all(config: OperatorsConfig, console: Console) -> list[Measurement]:
    """All numbers of ranks under a progress bar; each program counts when it is compiled and when it is measured."""
    if config.profile and jax.default_backend() != "gpu":
        raise ValueError(f"profile: exposed time is read from kernels of a GPU, this is {jax.default_backend()}")
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    numbers = numbers_of_ranks(config)
    programs = sum(4 * len(strategies_on(ranks, config)) * len(schedulers(config)) for ranks in numbers)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("programs compiled and measured", total=programs)
        advance = partial(progress.advance, task)
        return [measurement for ranks in numbers for measurement in measure(config, ranks, advance)]


def table(config: OperatorsConfig, measurements: Sequence[Measurement]) -> Table:
    """One row per number of ranks and strategy."""
    title = (
        f"{config.tokens_per_rank:,} tokens per rank on {jax.devices()[0].device_kind}: ms (quartiles), and over none"
    )
    result = Table(title=title)
    for heading in ("ranks", "strategy", "forward", "x none", "forward + backward", "x none"):
        result.add_column(heading, justify="left" if heading == "strategy" else "right")
    if config.profile:
        result.add_column("in exchange, ms", justify="right")
        result.add_column("exposed, ms (devices)", justify="right")
    last = None
    for m in measurements:
        if last is not None and m.ranks != last:
            result.add_section()
        last = m.ranks
        label = m.strategy if m.latency_hiding is not False else f"{m.strategy}, no latency hiding"
        cells = [str(m.ranks), label, milliseconds(m.forward), f"{m.forward_ratio:.2f}"]
        cells += [milliseconds(m.gradient), f"{m.gradient_ratio:.2f}"]
        if m.exposure is not None:
            cells += [f"{m.exposure.exchange * 1e3:.3f}"]
            cells += [f"{m.exposure.exposed_least * 1e3:.3f}-{m.exposure.exposed * 1e3:.3f}"]
        result.add_row(*cells)
    return result


def paper_table() -> Table:
    """The paper's operator, for comparison."""
    result = Table(title="arXiv 2507.01004, 16K tokens per H100: ms, and over no SP")
    result.add_column("GPUs", justify="right")
    for name in PAPER_MILLISECONDS[8]:
        result.add_column(name, justify="right")
    for ranks, row in PAPER_MILLISECONDS.items():
        result.add_row(str(ranks), *(f"{ms:.2f} ({ms / row['no SP']:.2f})" for ms in row.values()))
    return result


def record(config: OperatorsConfig, measurements: Sequence[Measurement]) -> dict[str, object]:
    """What operators.json holds."""
    rows = [asdict(m) | {"exposure": m.exposure and m.exposure._asdict()} for m in measurements]
    return conditions(config) | {
        "quartiles": "seconds of forward and gradient: first quartile, median, third quartile",
        "measurements": rows,
        "paper_milliseconds": PAPER_MILLISECONDS,
    }


def draw(config: OperatorsConfig, measurements: Sequence[Measurement], path: Path) -> None:
    """Time, and time over that without an exchange, with the paper's beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    rows = [m for m in measurements if m.latency_hiding == measurements[0].latency_hiding]
    draw_on = draw_scaling if len({m.ranks for m in rows}) > 1 else draw_strategies
    draw_on(rows, *figure.subplots(1, 2))
    backend = f", backend {config.backend}" if config.backend else ""
    figure.suptitle(
        f"{config.tokens_per_rank:,} tokens per rank, {config.heads} heads of {config.key_width} x "
        f"{config.value_width}, {config.dtype}{backend}, on {jax.devices()[0].device_kind}"
    )
    figure.savefig(path, dpi=120)


def draw_strategies(measurements: Sequence[Measurement], time_axes: "Axes", ratio_axes: "Axes") -> None:
    """One number of ranks: a bar for each strategy and pass; the paper's are of its smallest."""
    height = 0.4
    for offset, name, label in ((-height / 2, "forward", "forward"), (height / 2, "gradient", "forward and backward")):
        places = [place + offset for place in range(len(measurements))]
        medians = [1e3 * getattr(m, name)[1] for m in measurements]
        ratios = [getattr(m, f"{name}_ratio") for m in measurements]
        for axes, lengths in ((time_axes, medians), (ratio_axes, ratios)):
            axes.bar_label(axes.barh(places, lengths, height, label=label), fmt=" %.3g", fontsize="small")
    fewest = min(PAPER_MILLISECONDS)
    for name, style in (("LASP-1", ":"), ("LASP-2", "--"), ("ZeCO", "-")):
        row = PAPER_MILLISECONDS[fewest]
        label = f"paper, {fewest} GPUs: {name}"
        ratio_axes.axvline(row[name] / row["no SP"], linestyle=style, color="grey", label=label)
    time_axes.set_xlabel(f"ms on {measurements[0].ranks} ranks (median)")
    ratio_axes.set_xlabel("over none")
    for axes in (time_axes, ratio_axes):
        axes.set_yticks(range(len(measurements)), [m.strategy for m in measurements])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(axis="x", alpha=0.3)
        axes.legend(fontsize="small", loc="upper right")


def draw_scaling(measurements: Sequence[Measurement], time_axes: "Axes", ratio_axes: "Axes") -> None:
    """Weak scaling: over ranks."""
    for strategy in STRATEGIES:
        rows = [m for m in measurements if m.strategy == strategy]
        if not rows:
            continue
        ranks = [m.ranks for m in rows]
        low, median, high = (1e3 * jnp.array(column) for column in zip(*(m.gradient for m in rows), strict=True))
        (line,) = time_axes.plot(ranks, median, marker="o", label=strategy)
        time_axes.fill_between(ranks, low, high, alpha=0.15, color=line.get_color())
        ratio_axes.plot(ranks, [m.gradient_ratio for m in rows], marker="o", color=line.get_color(), label=strategy)
    for name, marker in (("LASP-1", "v"), ("LASP-2", "s"), ("ZeCO", "*")):
        ratios = [row[name] / row["no SP"] for row in PAPER_MILLISECONDS.values()]
        ratio_axes.plot(
            list(PAPER_MILLISECONDS), ratios, linestyle=":", color="grey", marker=marker, label=f"paper: {name}"
        )
    time_axes.set_ylabel("forward and backward, ms (median, quartiles)")
    ratio_axes.set_ylabel("over none")
    for axes in (time_axes, ratio_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("ranks, tokens per rank fixed")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", ncols=2)


def report(config: OperatorsConfig) -> None:
    """Measures, prints the tables, writes the files."""
    console = Console()
    # Refused once JAX has started; the devices are then what they are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(config.devices or (8,)))
    config.output.mkdir(parents=True, exist_ok=True)
    measurements = measure_all(config, console)
    console.print(table(config, measurements))
    console.print(paper_table())
    stem = config.output / "operators"
    write_results(stem, record(config, measurements), partial(draw, config, measurements), console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the operator under every strategy; see `run_program`."""
    return run_program("operators", OperatorsConfig, report, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
