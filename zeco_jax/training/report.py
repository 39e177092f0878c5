"""What a finished run leaves for people: summary, loss curve, sampled text."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from zeco_jax.models import LinearAttentionLM, sample
from zeco_jax.training.corpus import SEPARATOR
from zeco_jax.training.logs import read_metrics
from zeco_jax.training.loss import bits_per_byte

_SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a finished run.

    Attributes:
        steps: Optimizer steps.
        parameters: Number of parameters.
        devices: Devices of the mesh, as data x seq.
        platform: Kind of device.
        tokens: Tokens trained on.
        training_seconds: Time in training steps, over all resumptions, without compilation.
        tokens_per_second: Tokens per second of that time.
        model_flops_utilization: Share of the devices' peak that the model's own products took; None where no peak is
            known.
        training_bits_per_byte: Mean over the last tenth of the steps.
        validation_bits_per_byte: After the last step.
        sample: The prompt and its sampled continuation.
    """

    steps: int
    parameters: int
    devices: str
    platform: str
    tokens: int
    training_seconds: float
    tokens_per_second: float
    training_bits_per_byte: float
    validation_bits_per_byte: float
    sample: str
    # Last and optional, so that summaries from before it can be read.
    model_flops_utilization: float | None = None

    def write(self, directory: Path) -> None:
        """Writes `summary.json`.

        Args:
            directory: The run's output directory.
        """
        write_json(directory / _SUMMARY, dataclasses.asdict(self))

    @classmethod
    def read(cls, directory: Path) -> "Summary | None":
        """Reads `summary.json`.

        Args:
            directory: The run's output directory.

        Returns:
            The summary, or None if the run has written none.
        """
        path = directory / _SUMMARY
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def table(self) -> Table:
        """The summary as a table for the terminal."""
        table = Table("figure", "value", title="Training run")
        table.add_row("steps", f"{self.steps:,}")
        table.add_row("parameters", f"{self.parameters:,}")
        table.add_row("devices (data x seq)", f"{self.devices} {self.platform}")
        table.add_row("tokens", f"{self.tokens:,}")
        table.add_row("training time", f"{self.training_seconds:,.1f} s")
        table.add_row("throughput", f"{self.tokens_per_second:,.0f} tokens/s")
        if self.model_flops_utilization is not None:
            table.add_row("model FLOPs utilisation", f"{100 * self.model_flops_utilization:.1f} %")
        table.add_row("training loss", f"{self.training_bits_per_byte:.3f} bits per byte")
        table.add_row("validation loss", f"{self.validation_bits_per_byte:.3f} bits per byte")
        return table


def write_json(path: Path, value: object) -> None:
    """Writes JSON so that a killed process leaves the old file or the new one, never a part.

    Args:
        path: The file.
        value: What to write.
    """
    replacement = path.with_name(path.name + ".new")
    replacement.write_text(json.dumps(value, indent=2) + "\n")
    replacement.replace(path)


def draw_loss_curve(directory: Path) -> Path:
    """Draws training and validation loss over the steps, from the run's JSON lines.

    Args:
        directory: The run's output directory.

    Returns:
        The PNG file, `loss.png`.
    """
    training = read_metrics(directory / "metrics.jsonl")
    validation = read_metrics(directory / "validation.jsonl")
    steps = np.array([record["step"] for record in training])
    losses = np.array([bits_per_byte(record["loss"]) for record in training])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="training, each step")
    width = max(1, len(losses) // 30)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"training, mean of {width} steps")
    axes.plot(
        [record["step"] for record in validation],
        [record["bits_per_byte"] for record in validation],
        "o-",
        color="tab:orange",
        label="validation",
    )
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    path = directory / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def continue_text(
    model: LinearAttentionLM, prompt: str, *, length: int, key: jax.Array, temperature: float, top_k: int | None = None
) -> str:
    """Continues a text with sampled bytes.

    Args:
        model: A byte-level model on one device.
        prompt: Text to continue, not empty.
        length: Bytes to sample, zero or more.
        key: Random key.
        temperature: 0 takes the likeliest byte; larger is more varied.
        top_k: Sample among so many of the likeliest bytes only. None: among all.

    Returns:
        The continuation, up to the end of the document if the model ends it. Bytes that are no UTF-8 are shown as the
        replacement character.

    Raises:
        ValueError: The prompt is empty.
    """
    if not prompt:
        raise ValueError("prompt: got an empty text, expected at least one character")
    if length == 0:
        return ""
    tokens = jnp.asarray(np.frombuffer(prompt.encode(), np.uint8)[None].astype(np.int32))
    sampled = np.asarray(sample(model, tokens, steps=length, key=key, temperature=temperature, top_k=top_k))[0]
    ends = np.flatnonzero(sampled == SEPARATOR)
    shown = sampled[: ends[0]] if ends.size else sampled
    return bytes(byte if byte < 256 else 0xFF for byte in shown.tolist()).decode("utf-8", errors="replace")
