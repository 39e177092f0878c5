"""JAX's side of experiments.kernels: programs for a case, their inputs, times, memory and errors."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_cases import Case, Direction, Rates, Shape, errors_of, head_decays
from experiments.measuring import Timing, interleaved, seconds_of
from zeco_jax import linear_attention

SOFTMAX = "softmax (cuDNN)"
SOFTMAX_WIDTH = 128
"""Softmax attention gets heads of this width, as many as make up the same width of values."""
RUN_SECONDS = 0.05
"""A timed run repeats the program for so long, so that launching the first and waiting for the last don't count."""
CACHE_BYTES = 100e6
"""Twice the L2 cache of an H100: smaller inputs are taken in turns from several sets."""
REFERENCE_BYTES = 2 << 30
"""The token recurrence is left out where the states of all tokens take more."""

Arrays = Mapping[str, jax.Array]
Attend = Callable[[Arrays], jax.Array]
Program = Callable[..., Any]


@dataclass(frozen=True)
class Contender:
    """Something that attends to a case's tokens.

    Attributes:
        name: in the table.
        case: whose arrays it takes.
        attend: the outputs, as a function of named arrays; raises NotImplementedError where it cannot serve.
        linear: whether it computes linear attention, so that oracle and floor are those of the case.
        note: what to say of it in the table.
    """

    name: str
    case: Case
    attend: Attend
    linear: bool = True
    note: str = ""


def backend_contender(name: str, case: Case) -> Contender:
    """One of this project's backends."""

    def attend(arrays: Arrays) -> jax.Array:
        states = arrays["q"].size * arrays["v"].shape[-1] * 4
        if name == "reference" and states > REFERENCE_BYTES:
            raise NotImplementedError(f"would keep the states of all tokens, {states / 2**30:.0f} GiB")
        return linear_attention(**arrays, backend=name)[0]

    return Contender(name, case, attend)


def softmax_contender(case: Case) -> Contender:
    """Causal softmax attention in cuDNN, as many values per token as in `case`."""
    batch, tokens, heads, _, value_width = case.shape
    count = max(1, heads * value_width // SOFTMAX_WIDTH)
    shape = Shape(batch, tokens, count, SOFTMAX_WIDTH, SOFTMAX_WIDTH)

    def attend(arrays: Arrays) -> jax.Array:
        if jax.default_backend() != "gpu":
            raise NotImplementedError("needs a GPU")
        if count * SOFTMAX_WIDTH != heads * value_width:
            raise NotImplementedError(f"{heads} x {value_width} values are no whole heads of {SOFTMAX_WIDTH}")
        return jax.nn.dot_product_attention(
            arrays["q"], arrays["k"], arrays["v"], is_causal=True, implementation="cudnn"
        )

    note = f"{count} heads of {SOFTMAX_WIDTH}, no decay"
    return Contender(SOFTMAX, Case(case.name, shape, "none"), attend, linear=False, note=note)


def function(contender: Contender, direction: Direction) -> Program:
    """Outputs, or outputs and gradients by name, as a function of named arrays and the outputs' cotangent."""
    if direction == "forward":
        return lambda arrays, cotangent: contender.attend(arrays)

    def gradient(arrays: Arrays, cotangent: jax.Array) -> tuple[jax.Array, Arrays]:
        learned = {name: arrays[name] for name in contender.case.learned}
        out, pullback = jax.vjp(lambda learned: contender.attend({**arrays, **learned}), learned)
        return out, pullback(cotangent)[0]

    return gradient


def dtype_of(name: str) -> jnp.dtype:
    """Gates are float32, all else bfloat16."""
    return jnp.dtype(jnp.float32 if name == "log_decay" else jnp.bfloat16)


@partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(seed: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Standard normal variables, rounded from float32; by the generator that compiles fastest."""
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape).astype(dtype)


def draw(case: Case, seed: int = 0) -> tuple[Arrays, jax.Array]:
    """Random arguments of linear_attention by name, and a cotangent of its output, on the default device."""
    shapes = {**case.array_shapes, "cotangent": case.array_shapes["v"]}
    arrays = {name: normal(8 * seed + i, shapes[name], dtype_of(name)) for i, name in enumerate(shapes)}
    if case.decay == "head":
        arrays["log_decay"] = jnp.asarray(head_decays(case.shape.heads))
    elif case.decay != "none":
        arrays["log_decay"] = jax.nn.log_sigmoid(arrays["log_decay"]) / case.gate_normalizer
    return arrays, arrays.pop("cotangent")


def input_sets(case: Case) -> list[tuple[Arrays, jax.Array]]:
    """One set of inputs, or three where the device's cache could hold one."""
    first = draw(case)
    size = sum(array.nbytes for array in jax.tree.leaves(first))
    return [first] if size > CACHE_BYTES else [first, draw(case, 1), draw(case, 2)]


def describe(error: Exception) -> str:
    """In one line: the reason of a refusal, or the kind of error and its first line."""
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return first if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {first}"


def worst(errors: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest of each name's errors; NaN is larger than any.

    Example:
        >>> worst([{"out": 1.0, "q": 2.0}, {"out": 3.0, "q": float("nan")}])
        {'out': 3.0, 'q': nan}
    """
    return {name: float(np.max([each[name] for each in errors])) for name in (errors[0] if errors else ())}


@dataclass(frozen=True)
class Check:
    """Inputs of a few hundred tokens, and the outputs and gradients that the token recurrence has in float64."""

    case: Case
    arrays: Mapping[str, np.ndarray]
    want: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, case: Case, arrays: Mapping[str, np.ndarray]) -> "Check":
        """Runs the recurrence."""
        with jax.enable_x64(True):
            oracle = Contender("oracle", case, lambda arrays: linear_attention(**arrays, backend="reference")[0])
            wide = {name: jnp.float64(array) for name, array in arrays.items()}
            return cls(case, arrays, results(jax.jit(function(oracle, "gradient")), wide))

    def errors(self, program: Program) -> dict[str, float]:
        """Relative RMS on these inputs, by name, of a program for the gradients."""
        arrays = {name: jnp.asarray(array, dtype_of(name)) for name, array in self.arrays.items()}
        return errors_of(results(program, arrays), self.want)


def results(program: Program, arrays: Arrays) -> dict[str, np.ndarray]:
    """The outputs as `out` and the gradients by the names of what they belong to."""
    arguments = {name: array for name, array in arrays.items() if name != "cotangent"}
    out, gradients = program(arguments, arrays["cotangent"])
    return {name: np.asarray(array, np.float64) for name, array in {"out": out, **gradients}.items()}


class Compiled(NamedTuple):
    """A program of named arrays and a cotangent, and the bytes that it sets aside for results and in between."""

    program: Program
    extra_bytes: int


def lowered(contender: Contender, case: Case, direction: Direction) -> jax.stages.Lowered:
    """A contender's program for the shapes of a case; needs no device."""
    shapes = case.array_shapes
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype_of(name)) for name, shape in shapes.items()}
    cotangent = jax.ShapeDtypeStruct(shapes["v"], dtype_of("cotangent"))
    return jax.jit(function(contender, direction)).lower(arrays, cotangent)


def compiled(lowering: Future[jax.stages.Lowered]) -> Compiled:
    """The program that comes of it."""
    program = lowering.result().compile()
    memory = program.memory_analysis()
    return Compiled(program, memory.temp_size_in_bytes + memory.output_size_in_bytes)


Key = tuple[Case, str, Direction]
"""A program: its shapes, its contender's name, and its pass."""


def lower_all(
    pool: Executor,
    contenders: Mapping[Case, Sequence[Contender]],
    shorts: Mapping[Case, Sequence[Case]],
    directions: Sequence[Direction],
) -> dict[Key, Future[jax.stages.Lowered]]:
    """Begins to lower every program.

    It takes longer than compiling, as Python does it, one program after the other; and it leaves the device alone.

    Args:
        pool: does it.
        contenders: by case.
        shorts: cases to compare on, by case.
        directions: passes of the cases; comparisons take gradients.
    """
    tasks: dict[Key, Future] = {}
    for case, several in contenders.items():
        for one in several:
            wanted = [(one.case, direction) for direction in directions]
            # Cases that differ in T only share their comparisons.
            wanted += [(short, "gradient") for short in shorts[case] if one.linear]
            for shape, direction in wanted:
                if (shape, one.name, direction) not in tasks:
                    tasks[shape, one.name, direction] = pool.submit(lowered, one, shape, direction)
    return tasks


class Prepared(NamedTuple):
    """A contender before it runs.

    Attributes:
        contender: what is measured.
        compiled: programs by direction, those that there are.
        errors: relative RMS against the oracle by name.
        note: why something is missing, or what to know.
    """

    contender: Contender
    compiled: dict[Direction, Compiled]
    errors: dict[str, float]
    note: str


def prepare(
    contenders: Mapping[Case, Sequence[Contender]],
    checks: Mapping[Case, Sequence[Check]],
    directions: Sequence[Direction],
    lowering: Mapping[Key, Future[jax.stages.Lowered]],
    advance: Callable[[], None],
) -> dict[Case, list[Prepared]]:
    """Compiles everything at once, and holds it against the oracle; whatever fails leaves a note.

    Args:
        contenders: by case.
        checks: by case.
        directions: passes to time.
        lowering: all programs, from `lower_all`.
        advance: is called when a program is compiled, or has been compared.
    """

    def attempt[Result](task: Callable[[], Result]) -> Result | Exception:
        try:
            return task()
        except Exception as error:
            # A row of the table instead of no table at all.
            return error
        finally:
            advance()

    def compare(check: Check, program: Future[Compiled | Exception]) -> dict[str, float]:
        if isinstance(program.result(), Exception):
            raise program.result()
        return check.errors(program.result().program)

    comparing: dict[tuple[Case, str], Future] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = {key: pool.submit(attempt, partial(compiled, task)) for key, task in lowering.items()}
        for case, several in contenders.items():
            for one in several:
                for check in checks[case] if one.linear else ():
                    if (check.case, one.name) not in comparing:
                        program = compiling[check.case, one.name, "gradient"]
                        comparing[check.case, one.name] = pool.submit(attempt, partial(compare, check, program))

    def gather(case: Case, contender: Contender) -> Prepared:
        name = contender.name
        programs = {direction: compiling[contender.case, name, direction].result() for direction in directions}
        errors = [comparing[check.case, name].result() for check in checks[case] if contender.linear]
        failures = [value for value in (*programs.values(), *errors) if isinstance(value, Exception)]
        return Prepared(
            contender,
            {direction: value for direction, value in programs.items() if not isinstance(value, Exception)},
            {} if any(isinstance(value, Exception) for value in errors) else worst(errors),
            describe(failures[0]) if failures else contender.note,
        )

    return {case: [gather(case, one) for one in several] for case, several in contenders.items()}


def run_repeatedly(program: Program, inputs: Sequence[tuple], repeats: int) -> Any:
    """Starts the program `repeats` times, one after the other, and returns the last results."""
    for turn in range(repeats):
        last = program(*inputs[turn % len(inputs)])
    return last


def repeated(program: Program, inputs: Sequence[tuple], least: float) -> tuple[Callable[[], Any], int]:
    """A run that takes at least so many seconds, and how often it runs the program."""
    jax.block_until_ready(program(*inputs[0]))
    repeats = 1
    while (seconds := seconds_of(partial(run_repeatedly, program, inputs, repeats))) < least:
        repeats = math.ceil(1.2 * repeats * least / seconds)
    return partial(run_repeatedly, program, inputs, repeats), repeats


def time_programs(
    programs: Mapping[str, Program], inputs: Mapping[str, Sequence[tuple]], budget: float
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Seconds of one call of each program, in interleaved rounds.

    Args:
        programs: by name.
        inputs: sets of arguments by the programs' names, taken in turns.
        budget: seconds for all of them.

    Returns:
        Times by name, and why there is none for the others.
    """
    runs, repeats, failures = {}, {}, {}
    for name, program in programs.items():
        try:
            runs[name], repeats[name] = repeated(program, inputs[name], min(RUN_SECONDS, budget / 20))
        except Exception as error:
            failures[name] = describe(error)
    timings = interleaved(runs, budget=budget, fewest=5, most=50) if runs else {}
    return {name: timing.divided_by(repeats[name]) for name, timing in timings.items()}, failures


def measure_rates(budget: float) -> Rates:
    """Bytes a second of a large copy (with the sign changed, lest it be left out), and of a large matrix product."""
    large = jax.default_backend() != "cpu"
    numbers, width = (1 << 28, 8192) if large else (1 << 22, 512)
    matrices = tuple(jax.random.normal(jax.random.key(0), (2, width, width), jnp.bfloat16))
    vector = jnp.ones(numbers, jnp.float32)
    programs = {"copy": jax.jit(jnp.negative), "product": jax.jit(jnp.matmul)}
    inputs = {"copy": [(vector,)], "product": [matrices]}
    timings, failures = time_programs(programs, inputs, budget)
    if failures:
        raise RuntimeError(f"the device's rates cannot be measured: {failures}")
    return Rates(2 * vector.nbytes / timings["copy"].median, 2 * width**3 / timings["product"].median)
