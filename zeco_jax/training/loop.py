"""The training loop: from a configuration to a finished run, or on from where a killed one was."""

import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh
from rich.console import Console

from zeco_jax.training.checkpoints import Checkpoints
from zeco_jax.training.configuration import TrainConfig, identity, to_json
from zeco_jax.training.corpus import Corpus, read_documents, split_documents
from zeco_jax.training.data import Batch, place, training_batches, validation_batches
from zeco_jax.training.devices import make_mesh
from zeco_jax.training.logs import RunLogs, read_metrics
from zeco_jax.training.loss import bits_per_byte
from zeco_jax.training.parameters import Parameters
from zeco_jax.training.progress import ProgressDisplay
from zeco_jax.training.report import Summary, continue_text, draw_loss_curve, write_json
from zeco_jax.training.step import Metrics, Program, TrainState, compile_program, single_device_model
from zeco_jax.training.utilization import model_flops_utilization


def train(config: TrainConfig, *, console: Console | None = None) -> Summary | None:
    """Trains a model, or goes on with a run that was interrupted.

    Everything goes to `config.output`: `checkpoints/`, `metrics.jsonl` (one line per step), `validation.jsonl`,
    `tensorboard/`, `config.json`, and at the end `loss.png` and `summary.json`. A run that is killed loses the steps
    since its last checkpoint and nothing else; on the same devices it ends with the same numbers, bit for bit.

    Args:
        config: The run.
        console: Where to report. None: standard output. Processes other than the first report nothing.

    Returns:
        The figures of the finished run; if it had been finished before, those of then. None in all processes but the
        first.

    Raises:
        ValueError: The configuration is impossible, the data unusable, or the checkpoints are of another run.
        FloatingPointError: The loss became infinite or no number.
    """
    first = jax.process_index() == 0
    console = (console or Console()) if first else Console(quiet=True)
    mesh = make_mesh(config.mesh)
    program = compile_program(config, mesh)
    corpus, held_out = _read_corpora(config)
    shape = {"batch_size": config.batch_size, "sequence_length": config.sequence_length}
    batches = training_batches(corpus, **shape, seed=config.seed)
    validation = validation_batches(held_out, **shape, limit=config.evaluation.batches)

    facts = identity(config, corpus.checksum), dataclasses.asdict(program.model)
    with Checkpoints(config.output, config.checkpoint, *facts) as checkpoints:
        restored = checkpoints.restore(program.abstract_state())
        state = program.create() if restored is None else restored.state
        done = int(state.step)
        summary = Summary.read(config.output)
        if done >= config.steps and summary is not None and summary.steps == done:
            console.print(f"already finished: {done} steps in {config.output}", soft_wrap=True)
            return summary
        if restored is not None:
            console.print(f"resuming {config.output} after step {done}", soft_wrap=True)
        if first:
            write_json(config.output / "config.json", to_json(config))
        with (
            RunLogs(config.output, resume_step=done, tensorboard=config.logging.tensorboard, active=first) as logs,
            ProgressDisplay(console, steps=config.steps, done=done, visible=config.logging.progress) as display,
        ):
            clock = _Clock() if restored is None else _Clock(**restored.progress["clock"])
            loss = None
            recorder = _Recorder(config, mesh, logs, display, clock)
            for step in range(done + 1, config.steps + 1):
                state, metrics = program.train(state, place(batches[step - 1], mesh, config.chunk_tokens))
                recorder.add(step, metrics)
                last = step == config.steps
                if last or step % config.evaluation.every == 0:
                    recorder.drain()
                    loss = _evaluate(config, program, state.parameters, validation)
                    recorder.validated(step, loss)
                if last or step % config.checkpoint.every == 0:
                    recorder.drain()
                    logs.flush()
                    checkpoints.save(state, {"next_batch": step, "clock": dataclasses.asdict(clock)})
                    recorder.restart()
            if loss is None:  # A run that was killed between its last checkpoint and its reports.
                loss = _evaluate(config, program, state.parameters, validation)
    return _finish(config, program, state, clock, loss) if first else None


def _read_corpora(config: TrainConfig) -> tuple[Corpus, Corpus]:
    """The text to train on and the text held out."""
    documents = read_documents(config.data.directory)
    training, held_out = split_documents(documents, config.data.validation_fraction)
    return Corpus.from_documents(training), Corpus.from_documents(held_out)


def _evaluate(config: TrainConfig, program: Program, parameters: Parameters, batches: Sequence[Batch]) -> float:
    """Mean loss of the batches, in nats per byte."""
    total = count = 0.0
    for batch in batches:
        loss = program.evaluate(parameters, place(batch, program.mesh, config.chunk_tokens))
        total, count = total + float(loss.total), count + float(loss.count)
    return total / max(count, 1.0)


@dataclass
class _Clock:
    """Time spent in training steps over all resumptions, without the first step of a process: it compiles."""

    steps: int = 0
    seconds: float = 0.0

    def rate(self, tokens_per_step: int) -> float:
        """Tokens per second; 0 before anything was timed."""
        return self.steps * tokens_per_step / self.seconds if self.seconds else 0.0


class _Recorder:
    """Reads the metrics from the devices, several steps at a time, and passes them to the logs and the display.

    On an accelerator the host runs ahead of the devices meanwhile. On CPU devices it waits for every step: they share
    the host's cores, and steps that overlap only starve each other.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, logs: RunLogs, display: ProgressDisplay, clock: _Clock) -> None:
        self._tokens_per_step = config.batch_size * config.sequence_length
        self._every = config.logging.every
        self._waits = mesh.devices.flat[0].platform == "cpu"
        self._logs = logs
        self._display = display
        self._clock = clock
        self._compiled = False
        self._pending: list[tuple[int, Metrics]] = []
        self._since = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Notes the metrics of a step that may still be under way."""
        self._pending.append((step, metrics))
        if self._waits:
            jax.block_until_ready(metrics)
        if not self._compiled or len(self._pending) >= self._every:
            self.drain()

    def drain(self) -> None:
        """Logs all metrics noted so far."""
        if not self._pending:
            return
        fetched = [(step, Metrics(*map(float, metrics))) for step, metrics in self._pending]
        seconds = time.perf_counter() - self._since
        rate = len(fetched) * self._tokens_per_step / seconds
        if self._compiled:
            self._clock.steps += len(fetched)
            self._clock.seconds += seconds
        for step, metrics in fetched:
            if not math.isfinite(metrics.loss):
                raise FloatingPointError(
                    f"the loss of step {step} is {metrics.loss}; a lower --optimizer.learning-rate may help"
                )
            self._logs.step({"step": step, **metrics._asdict(), "tokens_per_second": rate})
        self._display.update(fetched[-1][0], bits_per_byte(fetched[-1][1].loss), rate)
        self._pending.clear()
        self._compiled = True
        self.restart()

    def validated(self, step: int, loss: float) -> None:
        """Passes on the result of a validation."""
        self._logs.validation({"step": step, "loss": loss, "bits_per_byte": bits_per_byte(loss)})
        self._display.note(f"step {step}: validation {bits_per_byte(loss):.3f} bits per byte")
        self.restart()

    def restart(self) -> None:
        """Leaves the time since the last step out of the throughput."""
        self._since = time.perf_counter()


def _finish(config: TrainConfig, program: Program, state: TrainState, clock: _Clock, loss: float) -> Summary:
    """Samples, sums up, and writes the reports."""
    steps = int(state.step)
    tokens_per_step = config.batch_size * config.sequence_length
    tokens_per_second = clock.rate(tokens_per_step)
    device = program.mesh.devices.flat[0]
    evaluation = config.evaluation
    continuation = continue_text(
        single_device_model(program.model, state.parameters),
        evaluation.prompt,
        length=evaluation.sample_bytes,
        key=jax.random.fold_in(jax.random.wrap_key_data(state.key.addressable_data(0)), steps),
        temperature=evaluation.temperature,
    )
    records = read_metrics(config.output / "metrics.jsonl")
    final_losses = [record["loss"] for record in records[-math.ceil(len(records) / 10) :]]
    summary = Summary(
        steps=steps,
        parameters=sum(parameter.size for parameter in state.parameters.values()),
        devices=f"{config.mesh.data} x {config.mesh.seq}",
        platform=device.platform,
        tokens=steps * tokens_per_step,
        training_seconds=clock.seconds,
        tokens_per_second=tokens_per_second,
        model_flops_utilization=model_flops_utilization(
            program.model,
            tokens_per_second,
            devices=program.mesh.size,
            device_kind=device.device_kind,
            sequence_length=config.sequence_length,
        ),
        training_bits_per_byte=bits_per_byte(statistics.fmean(final_losses)),
        validation_bits_per_byte=bits_per_byte(loss),
        sample=evaluation.prompt + continuation,
    )
    draw_loss_curve(config.output)
    summary.write(config.output)
    return summary
