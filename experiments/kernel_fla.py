"""FLA's kernels under the clock: the process that experiments.kernels starts for each of them, where there is no JAX.

    python -m experiments.kernel_fla JOB OPERATION FIRST
    python -m experiments.kernel_fla JOB OPERATION CASE compile

JOB is the file that experiments.kernel_peers writes. Records go to OPERATION.jsonl beside it, one JSON object a line,
as soon as they are known: a process that dies loses one case, and is started again at the next, FIRST. With `compile`
nothing is measured: Triton's cache is filled for one CASE, by a process beside those of other cases.

Triton's tuning is done again for every case, since FLA's keys leave out B and T and mostly K and V. The candidates are
compiled in parallel; that leaves their times as they are. What was tuned for a case is then also what is checked.
"""

import gc
import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

DEVICE = "cuda"
RUN_SECONDS = 0.05
"""A timed run repeats the call for so long, so that launching the first and waiting for the last don't count."""
TUNING_MILLISECONDS = (5, 20)
"""Warm-up and measurement of one candidate; Triton's own choice is 25 and 100."""
LIGHTNING_LAYER, LIGHTNING_LAYERS = 1, 2
"""Half the largest slopes, as in experiments.kernel_cases.head_decays."""
REFUSAL = "#640"
"""FLA's issue of a Triton that miscompiles the gated backward of simple_gla for some tiles on Hopper."""

Tensors = dict[str, Any]


class QuickTuning:
    """Triton's tuning with short measurements, candidates compiled in parallel, and the choice of starting afresh."""

    def __init__(self, threads: int) -> None:
        """Remembers every tuner that tunes.

        Args:
            threads: compiling at a time.
        """
        self.threads = threads
        self.tuners: dict[int, Any] = {}

    def install(self, *, timed: bool = True) -> None:
        """Takes effect for all tuners of this process.

        Args:
            timed: whether candidates are timed; otherwise any will do, once all are compiled.
        """
        from triton.runtime.autotuner import Autotuner
        from triton.testing import do_bench

        warmup, measured = TUNING_MILLISECONDS
        candidates_of = Autotuner.prune_configs

        def measure(call: Callable[[], None], quantiles: Any) -> Any:
            if not timed:
                return (1.0, 1.0, 1.0)
            return do_bench(call, warmup=warmup, rep=measured, quantiles=quantiles)

        def candidates(tuner: Autotuner, arguments: dict[str, Any]) -> list[Any]:
            self.tuners[id(tuner)] = tuner
            configurations = candidates_of(tuner, arguments)
            # FLA names every argument; with others the launch could not be repeated from here.
            if len(configurations) > 1 and not tuner.nargs:
                self.compile_all(tuner, configurations, arguments)
            return configurations

        Autotuner.do_bench = property(lambda tuner: measure)
        Autotuner.prune_configs = candidates

    def compile_all(self, tuner: Any, configurations: list[Any], arguments: dict[str, Any]) -> None:
        """Fills Triton's cache; what fails here fails again, and is reported, where it is measured."""
        import triton

        launch = {name: value for name, value in arguments.items() if name != "warmup"}
        try:
            with ThreadPoolExecutor(self.threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
                for configuration in configurations:
                    tuner.fn.warmup(**launch, **configuration.all_kwargs())
        except Exception:
            traceback.print_exc()

    def forget(self) -> None:
        """Lets every tuner tune again."""
        for tuner in self.tuners.values():
            tuner.cache.clear()


def operation(name: str) -> Callable[[Tensors], Any]:
    """FLA's function of that name, from tensors by the names of linear_attention to the outputs."""
    module = {"chunk_gla": "gla", "chunk_simple_gla": "simple_gla", "chunk_lightning_attn": "lightning_attn"}
    function = getattr(importlib.import_module(f"fla.ops.{module[name]}"), name)
    fixed = {"layer_idx": LIGHTNING_LAYER, "num_layers": LIGHTNING_LAYERS} if name == "chunk_lightning_attn" else {}
    gates = {} if fixed else {"g": "log_decay"}

    def call(tensors: Tensors) -> Any:
        arguments = {"q": "q", "k": "k", "v": "v"} | gates
        return function(**{name: tensors[source] for name, source in arguments.items()}, **fixed)[0]

    return call


def refusing_module() -> ModuleType:
    """Where FLA decides whether to refuse."""
    return importlib.import_module("fla.ops.common.chunk_o")


def unrefused(call: Callable[[], Any]) -> bool:
    """Calls, and lets FLA's gated backward run where FLA refuses it; the errors then say whether its results are right.

    Returns:
        Whether it was refused.
    """
    try:
        call()
    except RuntimeError as error:
        if REFUSAL not in str(error):
            raise
        refusing_module().IS_NVIDIA_HOPPER = False
        call()
        return True
    return False


@contextmanager
def refusal_restored() -> Iterator[None]:
    """Afterwards FLA refuses again what it refused before."""
    module = refusing_module()
    before = module.IS_NVIDIA_HOPPER
    try:
        yield
    finally:
        module.IS_NVIDIA_HOPPER = before


def random_inputs(case: dict[str, Any]) -> Tensors:
    """Arguments by name, as experiments.kernel_programs draws them, and a cotangent of the outputs."""
    import torch

    batch, tokens, heads, key_width, value_width = case["shape"]
    keys, values = (batch, tokens, heads, key_width), (batch, tokens, heads, value_width)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    shapes = {"q": keys, "k": keys, "v": values, "cotangent": values}
    tensors = {name: normal(*shape).bfloat16() for name, shape in shapes.items()}
    if case["decay"] in ("channel", "token"):
        gates = normal(*(keys if case["decay"] == "channel" else keys[:3]))
        tensors["log_decay"] = torch.nn.functional.logsigmoid(gates) / case["gate_normalizer"]
    return tensors


def stored_inputs(path: str) -> Tensors:
    """The same from a file of float32 arrays."""
    import torch

    with np.load(path) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]).to(DEVICE) for name in arrays.files}
    return {name: x if name == "log_decay" else x.bfloat16() for name, x in tensors.items()}


def calls(run: Callable[[Tensors], Any], tensors: Tensors) -> dict[str, Callable[[], Any]]:
    """The passes by name, without arguments; the gradient is that of all tensors but the `cotangent`."""
    import torch

    arguments = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name != "cotangent"}

    def forward() -> Any:
        with torch.no_grad():
            return run(arguments)

    def gradient() -> Any:
        out = run(arguments)
        return out, torch.autograd.grad(out, list(arguments.values()), tensors["cotangent"])

    return {"forward": forward, "gradient": gradient}


def write_results(run: Callable[[Tensors], Any], given: str, path: str) -> None:
    """Outputs and gradients of stored inputs as float32, for experiments.kernels to compare."""
    tensors = stored_inputs(given)
    names = [name for name in tensors if name != "cotangent" and not (name == "log_decay" and tensors[name].ndim == 1)]
    tensors = {name: tensors[name] for name in (*names, "cotangent")}
    out, gradients = calls(run, tensors)["gradient"]()
    arrays = {"out": out, **dict(zip(names, gradients, strict=True))}
    np.savez(path, **{name: x.detach().float().cpu().numpy() for name, x in arrays.items()})


def elapsed(call: Callable[[], Any], repeats: int) -> float:
    """Seconds on the device for so many calls in a row."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def time_call(call: Callable[[], Any], budget: float) -> list[float]:
    """Seconds of one call, once for each round, of which there are five at least."""
    elapsed(call, 2)
    repeats = math.ceil(RUN_SECONDS / elapsed(call, 3) * 3)
    start, seconds = time.monotonic(), []
    while len(seconds) < 5 or (time.monotonic() - start < budget and len(seconds) < 50):
        seconds.append(elapsed(call, repeats) / repeats)
    return seconds


def time_graph(call: Callable[[], Any], budget: float) -> list[float]:
    """The same from a CUDA graph: without what Python takes to launch the kernels."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # What the graph writes has to stay its own.
        results = call()
    seconds = time_call(graph.replay, budget)
    del results
    return seconds


def extra_memory(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates at most, results included."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del results
    return peak - before


def measure(case: dict[str, Any], job: dict[str, Any], name: str, emit: Callable[..., None]) -> None:
    """One case: tuned, timed, compared."""
    import torch

    run = operation(name)
    inputs = random_inputs(case)
    started = time.monotonic()
    chosen = {direction: call for direction, call in calls(run, inputs).items() if direction in job["directions"]}
    for direction, call in chosen.items():
        refused = unrefused(call)
        torch.cuda.synchronize()
        emit(direction=direction, tuning=time.monotonic() - started, refused=refused)
        emit(direction=direction, seconds=time_call(call, job["seconds"]), extra_bytes=extra_memory(call))
    for given, path in case["checks"]:
        unrefused(partial(write_results, run, given, path))
    # Last, since a capture that fails may take the process with it.
    try:
        for direction, call in chosen.items():
            emit(direction=direction, graph_seconds=time_graph(call, job["seconds"]))
    except Exception as error:
        raise RuntimeError(f"no CUDA graph: {error}") from error


def compile_case(case: dict[str, Any], name: str, directions: list[str]) -> None:
    """Compiles all candidates for one case."""
    for direction, call in calls(operation(name), random_inputs(case)).items():
        if direction in directions:
            unrefused(call)


def main(arguments: list[str]) -> int:
    """Measures all cases of a job from the given one on, or compiles what one case needs.

    Args:
        arguments: the job's file, FLA's operation, the number of the first case; and `compile`.

    Returns:
        Exit status: 0, or 3 where the device no longer answers and a new process has to go on.
    """
    job_path, name, first = Path(arguments[0]), arguments[1], int(arguments[2])
    job = json.loads(job_path.read_text())
    tuning = QuickTuning(max(1, (os.cpu_count() or 1) - 1))
    if "compile" in arguments:
        tuning.install(timed=False)
        compile_case(job["cases"][name][first], name, job["directions"])
        return 0
    import torch

    tuning.install()
    with job_path.with_name(f"{name}.jsonl").open("a") as records:

        def write(**values: Any) -> None:
            print(json.dumps(values), file=records, flush=True)

        import fla
        import triton

        write(versions={"fla": fla.__version__, "torch": torch.__version__, "triton": triton.__version__})
        for index, case in enumerate(job["cases"][name]):
            if index < first:
                continue

            def emit(index: int = index, **values: Any) -> None:
                write(case=index, **values)

            emit(started=True)
            tuning.forget()
            torch.cuda.empty_cache()
            try:
                with refusal_restored():
                    measure(case, job, name, emit)
            except Exception as error:
                traceback.print_exc()
                emit(error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300])
                try:
                    torch.cuda.synchronize()
                except Exception:
                    return 3
            emit(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
