"""Linear attention on one device against FLA, softmax attention and the device itself: `python -m experiments.kernels`.

    python -m experiments.kernels                                        the named shapes on a GPU, tiny ones on a CPU
    python -m experiments.kernels --shapes 32k --decays channel --peers none   one shape, this project's backends only
    python -m experiments.kernels --passes forward --backends xla        one pass, one backend

Forward, and forward with the gradients of q, k, v and the gates, on bfloat16 q, k, v and float32 gates. A row for each
backend of this project; for FLA's kernel for the same decay, tuned for each shape, where it can be imported; and for
cuDNN's softmax attention, another function, with as many values per token. FLA is `pip install fla-core` where PyTorch
is; for a machine without a registry, `pip download --no-deps fla-core` elsewhere and carry the wheel there.

Times are those of programs started back to back, FLA's the better of that and of a CUDA graph. Floor: bytes that must
move over the rate of a large copy, or operations over the rate of a large matrix product, both measured in the same
run, whichever is longer. Errors: relative RMS against the token recurrence in float64, the largest over two sequences
of some 500 tokens, on inputs that all share. Prints tables, writes kernels.json and kernels.png (kernels-cpu on a CPU).
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.command_line import run_program
from experiments.kernel_cases import (
    SHAPES,
    Case,
    Decay,
    Direction,
    Rates,
    check_arrays,
    errors_of,
    floor_of,
)
from experiments.kernel_peers import PeerResult, measure_fla, missing_packages
from experiments.kernel_programs import (
    Check,
    Contender,
    Prepared,
    backend_contender,
    input_sets,
    lower_all,
    measure_rates,
    prepare,
    softmax_contender,
    time_programs,
    worst,
)
from experiments.measuring import Timing, milliseconds, spread
from experiments.results_files import conditions, write_results
from zeco_jax.attention import BACKENDS

RESULTS = Path(__file__).parent / "results"
PASSES = {"forward": "forward", "gradient": "forward + backward"}
DECAYS: tuple[Decay, ...] = Decay.__args__
CHECK_TOKENS = (512, 487)
"""Tokens compared with the oracle, or up to so many where the shape has fewer; the second doesn't fill its chunks."""
ORACLES = 4
"""Recurrences at a time: each keeps the states of all its tokens, gigabytes in float64."""
TITLES = {"log_decay": "gate"}


@dataclass(frozen=True)
class KernelsConfig:
    """What is measured, and where the results go."""

    shapes: tuple[str, ...] | None = None
    """Names of shapes; None: all but the tiny ones on a GPU, the tiny ones on a CPU."""
    decays: tuple[Decay, ...] = ("channel", "token")
    """Gates per key channel, per token and head, constants per head, or none."""
    passes: tuple[Direction, ...] = ("forward", "gradient")
    """The forward pass alone, and together with the backward pass."""
    backends: tuple[str, ...] = tuple(BACKENDS)
    """This project's backends; one that cannot serve gets a row that says why."""
    peers: tuple[Literal["fla", "cudnn", "none"], ...] = ("fla", "cudnn")
    """Others to compare with, or none."""
    gate_normalizer: float = 16.0
    """Gates are log sigmoid of a standard normal variable, over this: 16 as layers start out, 1 for strong decay."""
    seconds: float = 1.0
    """Measuring time for all backends on one shape, decay and pass; half as much for FLA. Compiling comes on top."""
    peer_timeout: float = 150.0
    """Seconds after which one of FLA's operations, with all its shapes, is given up; tuning takes most of it."""
    output: Path = RESULTS
    """Directory for the results."""

    def __post_init__(self) -> None:
        check_names("shapes", self.shapes, SHAPES)
        check_names("decays", self.decays, DECAYS)
        check_names("passes", self.passes, PASSES)
        check_names("backends", self.backends, tuple(BACKENDS))
        check_names("peers", self.peers, ("fla", "cudnn", "none"))
        if "none" in self.peers and len(self.peers) > 1:
            raise ValueError(f"peers must be none or some, got {', '.join(self.peers)}")
        for name in ("gate_normalizer", "seconds", "peer_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def check_names(argument: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    """Raises ValueError unless at least one name is given, and all are known."""
    if given is None:
        return
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        what = f"unknown {', '.join(unknown)}" if unknown else "none given"
        raise ValueError(f"{argument}: {what}; expected some of {', '.join(known)}")


@dataclass(frozen=True)
class Measurement:
    """One contender's pass on one case.

    Attributes:
        case: shape and decay.
        name: the contender.
        direction: forward, or gradient for forward and backward together.
        timing: seconds of a call; None where there is nothing to measure.
        extra_bytes: most that is allocated besides the inputs: results and what is needed in between.
        errors: relative RMS against the oracle by name: of the outputs, or of the gradients.
        note: why something is missing, or what to know.
        linear: whether it computes linear attention, so that floor and FLA are comparable.
        ours: whether it is this program's own measurement, not FLA's.
    """

    case: Case
    name: str
    direction: Direction
    timing: Timing | None
    extra_bytes: int | None
    errors: dict[str, float]
    note: str = ""
    linear: bool = True
    ours: bool = True


@dataclass(frozen=True)
class Results:
    """All that a run found.

    Attributes:
        config: what was asked for.
        rates: of this device.
        measurements: case by case, pass by pass.
        peer_versions: of FLA's packages, by name.
        tuning_seconds: that FLA took until its first call was done, by case and pass.
    """

    config: KernelsConfig
    rates: Rates
    measurements: list[Measurement]
    peer_versions: dict[str, str]
    tuning_seconds: dict[str, dict[Direction, float]]


def cases_of(config: KernelsConfig) -> list[Case]:
    """Shapes by decays."""
    tiny = [name for name in SHAPES if name.startswith("tiny")]
    chosen = config.shapes
    if chosen is None:
        chosen = [name for name in SHAPES if (name in tiny) == (jax.default_backend() != "gpu")]
    return [Case(name, SHAPES[name], decay, config.gate_normalizer) for decay in config.decays for name in chosen]


def check_inputs(case: Case) -> list[tuple[Case, dict]]:
    """Short cases, and inputs for them."""
    lengths = [min(tokens, case.shape.tokens - 7 * turn) for turn, tokens in enumerate(CHECK_TOKENS)]
    return [(short, check_arrays(short, seed)) for seed, short in enumerate(map(case.shortened, lengths))]


def measure_peers(
    config: KernelsConfig, inputs: Mapping[Case, Sequence[tuple[Case, dict]]], console: Console
) -> tuple[dict[Case, PeerResult], dict[str, str]]:
    """FLA on all cases, given inputs to compare on, or the reason why not, and the versions of its packages."""
    reason = missing_packages()
    if not reason and jax.default_backend() != "gpu":
        reason = "needs a GPU"
    if reason:
        return {case: PeerResult("FLA", reason=reason) for case in inputs}, {}
    with tempfile.TemporaryDirectory() as folder:
        return measure_fla(
            list(inputs),
            {case: [arrays for _, arrays in several] for case, several in inputs.items()},
            config.passes,
            Path(folder),
            seconds=config.seconds / 2,
            timeout=config.peer_timeout,
            announce=partial(console.print, markup=False),
        )


def contenders_of(config: KernelsConfig, case: Case) -> list[Contender]:
    """Backends, and softmax attention."""
    ours = [backend_contender(name, case) for name in dict.fromkeys(config.backends)]
    return [*ours, softmax_contender(case)] if "cudnn" in config.peers else ours


def measure_case(
    config: KernelsConfig, case: Case, prepared: Sequence[Prepared], checks: Sequence[Check], peer: PeerResult | None
) -> list[Measurement]:
    """Times everything on one case.

    Args:
        config: what to measure.
        case: shape and decay.
        prepared: what is compiled for this case.
        checks: of this case.
        peer: what FLA did; None if it isn't asked for.
    """
    drawn = {one.contender.case: input_sets(one.contender.case) for one in prepared if one.compiled}
    inputs = {one.contender.name: drawn[one.contender.case] for one in prepared if one.compiled}
    measurements = []
    for direction in config.passes:
        programs = {
            one.contender.name: one.compiled[direction].program for one in prepared if direction in one.compiled
        }
        timings, failures = time_programs(programs, inputs, config.seconds)
        for one in prepared:
            name = one.contender.name
            measurements.append(
                Measurement(
                    case,
                    name,
                    direction,
                    linear=one.contender.linear,
                    timing=timings.get(name),
                    extra_bytes=one.compiled[direction].extra_bytes if direction in one.compiled else None,
                    errors=errors_for(direction, one.errors),
                    note=failures.get(name, one.note),
                )
            )
        if peer is not None:
            measurements.append(peer_measurement(case, direction, peer, checks))
    return measurements


def peer_measurement(case: Case, direction: Direction, peer: PeerResult, checks: Sequence[Check]) -> Measurement:
    """FLA's row."""
    errors = worst([errors_of(got, check.want) for got, check in zip(peer.check_results, checks, strict=False)])
    notes = [peer.reason] if peer.reason else []
    if direction in peer.in_graph:
        notes.append("in a CUDA graph")
    if peer.refused and direction == "gradient":
        notes.append("refused by FLA with this Triton (issue 640), run nevertheless")
    return Measurement(
        case,
        peer.name,
        direction,
        timing=Timing(tuple(peer.seconds[direction])) if direction in peer.seconds else None,
        extra_bytes=peer.extra_bytes.get(direction),
        errors=errors_for(direction, errors),
        note="; ".join(notes),
        ours=False,
    )


def errors_for(direction: Direction, errors: Mapping[str, float]) -> dict[str, float]:
    """That of the outputs, or those of the gradients."""
    names = ("out",) if direction == "forward" else ("q", "k", "v", "log_decay")
    return {name: errors[name] for name in names if name in errors}


def measure_all(config: KernelsConfig, console: Console) -> Results:
    """FLA first, while this process holds no memory of the GPU; then everything else, case by case."""
    cases = cases_of(config)
    contenders = {case: contenders_of(config, case) for case in cases}
    inputs = {case: check_inputs(case) for case in cases}
    shorts = {case: [short for short, _ in inputs[case]] for case in cases}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(*columns, console=console) as progress:
        # Meanwhile FLA has the device, in processes of its own.
        lowering = lower_all(pool, contenders, shorts, config.passes)
        peers, versions = measure_peers(config, inputs, console) if "fla" in config.peers else ({}, {})
        arrays = {short: given for case in cases for short, given in inputs[case]}
        computing = progress.add_task("inputs computed by the oracle", total=len(arrays))
        with ThreadPoolExecutor(ORACLES) as oracles:
            pending = {short: oracles.submit(Check.of, short, given) for short, given in arrays.items()}
            for task in as_completed(pending.values()):
                task.result()
                progress.advance(computing)
        checks = {case: [pending[short].result() for short in shorts[case]] for case in cases}
        preparing = progress.add_task("programs compiled or compared", total=None)
        prepared = prepare(contenders, checks, config.passes, lowering, partial(progress.advance, preparing))
        rates = measure_rates(config.seconds)
        timing = progress.add_task("cases timed", total=len(cases))
        measurements = []
        for case in cases:
            measurements += measure_case(config, case, prepared[case], checks[case], peers.get(case))
            progress.advance(timing)
    return Results(config, rates, measurements, versions, {case.label: peers[case].tuning_seconds for case in peers})


def over(measurement: Measurement, seconds: float | None) -> float | None:
    """The median over so many seconds; None where one of them is missing."""
    if measurement.timing is None or seconds is None or not measurement.linear:
        return None
    return measurement.timing.median / seconds


def peer_seconds(measurement: Measurement, measurements: Sequence[Measurement]) -> float | None:
    """FLA's median on the same case and pass."""
    for other in measurements:
        same = (other.case, other.direction) == (measurement.case, measurement.direction)
        if not other.ours and same and other.timing is not None:
            return other.timing.median
    return None


def table(case: Case, results: Results) -> Table:
    """One row per contender and pass."""
    floors = {direction: floor_of(case, direction, results.rates) for direction in results.config.passes}
    named = (f"{PASSES[name]} {floor.seconds * 1e3:.3g} ms ({floor.limit})" for name, floor in floors.items())
    sizes = ", ".join(f"{letter} {size}" for letter, size in zip("BTHKV", case.shape, strict=True))
    result = Table(title=f"{case.label} ({sizes}); floor: {', '.join(named)}")
    headings = ("", "pass", "ms (quartiles)", "/ floor", "/ FLA", "Mtokens/s", "extra MiB", "relative RMS, 1e-3", "")
    for heading in headings:
        result.add_column(heading, justify="right" if "/" in heading or "M" in heading or "ms" in heading else "left")
    for direction in results.config.passes:
        result.add_section()
        for one in results.measurements:
            if (one.case, one.direction) == (case, direction):
                result.add_row(*cells(one, floors[direction].seconds, peer_seconds(one, results.measurements)))
    return result


def cells(one: Measurement, floor: float, peer: float | None) -> list[str]:
    """A row of the table; blank is what there is no figure for."""
    timing = one.timing
    tokens = one.case.shape.batch * one.case.shape.tokens
    ratios = [f"{ratio:.2f}" if ratio is not None else "" for ratio in (over(one, floor), over(one, peer))]
    return [
        one.name,
        PASSES[one.direction],
        milliseconds(spread(timing)) if timing else "",
        *ratios,
        f"{tokens / timing.median / 1e6:.3g}" if timing else "",
        f"{one.extra_bytes / 2**20:,.1f}" if one.extra_bytes is not None else "",
        ", ".join(f"{TITLES.get(name, name)} {1e3 * error:.2g}" for name, error in one.errors.items()),
        one.note,
    ]


def record(results: Results) -> dict[str, object]:
    """What the JSON file holds."""
    return conditions(results.config) | {
        "versions": results.peer_versions,
        "rates": asdict(results.rates),
        "shapes": {name: SHAPES[name]._asdict() for name in {one.case.name for one in results.measurements}},
        "seconds": "first quartile, median, third quartile of a call",
        "measurements": [
            {
                "shape": one.case.name,
                "decay": one.case.decay,
                "name": one.name,
                "pass": one.direction,
                "seconds": spread(one.timing) if one.timing else None,
                "rounds": len(one.timing.seconds) if one.timing else 0,
                "floor": floor._asdict() if one.linear else None,
                "over_floor": over(one, floor.seconds),
                "over_fla": over(one, peer_seconds(one, results.measurements)),
                "extra_bytes": one.extra_bytes,
                "relative_rms": one.errors,
                "note": one.note,
            }
            for one in results.measurements
            for floor in (floor_of(one.case, one.direction, results.rates),)
        ],
        "fla_tuning_seconds": results.tuning_seconds,
    }


def draw(results: Results, path: Path) -> None:
    """Milliseconds of every contender, case by case, with the floor as a line; one panel for each pass."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(one.case for one in results.measurements))
    names = list(dict.fromkeys(one.name for one in results.measurements if one.timing))
    passes = results.config.passes
    figure = Figure(figsize=(max(6.0, 2.0 + 1.4 * len(cases)), 4.0 * len(passes)), layout="constrained")
    panels = figure.subplots(len(passes), 1, squeeze=False)
    width = 0.8 / max(1, len(names))
    for direction, axes in zip(passes, panels[:, 0], strict=True):
        for turn, name in enumerate(names):
            rows = [
                one for one in results.measurements
                if one.name == name and one.direction == direction and one.timing
            ]  # fmt: skip
            places = [cases.index(one.case) - 0.4 + width * (turn + 0.5) for one in rows]
            medians = [1e3 * one.timing.median for one in rows]
            axes.bar(places, medians, width, label=name)
        floors = [1e3 * floor_of(case, direction, results.rates).seconds for case in cases]
        starts = [place - 0.45 for place in range(len(cases))]
        axes.hlines(floors, starts, [start + 0.9 for start in starts], color="black", label="floor")
        axes.set_yscale("log")
        axes.set_ylabel(f"{PASSES[direction]}, ms")
        axes.set_xticks(range(len(cases)), [case.label.replace(", ", "\n") for case in cases], fontsize="small")
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", fontsize="small", ncols=8)
    figure.suptitle(f"Linear attention on {jax.devices()[0].device_kind}, bfloat16")
    figure.savefig(path, dpi=120)


def report(config: KernelsConfig) -> None:
    """Measures, prints the tables, writes the files."""
    # Read when JAX takes a GPU: what it doesn't need is left to FLA's processes.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Rows are long, and a file is as wide as one likes.
    console = Console(width=None if sys.stdout.isatty() else 170)
    config.output.mkdir(parents=True, exist_ok=True)
    results = measure_all(config, console)
    for case in dict.fromkeys(one.case for one in results.measurements):
        console.print(table(case, results))
    rates = results.rates
    console.print(
        f"this device: {rates.bytes_per_second / 1e12:.3g} TB/s copied, "
        f"{rates.operations_per_second / 1e12:.3g} TFLOP/s of bfloat16 products"
    )
    platform = jax.default_backend()
    stem = config.output / ("kernels" if platform == "gpu" else f"kernels-{platform}")
    write_results(stem, record(results), partial(draw, results), console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures kernels, this project's and others'; see `run_program`."""
    return run_program("kernels", KernelsConfig, report, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
