"""What a run shows while it goes on: a bar on a terminal, a line now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressDisplay:
    """Shows steps, loss, throughput and the time left; a context manager.

    Args:
        console: Where to show it.
        steps: Steps of the whole run.
        done: Steps done by an earlier process.
        visible: False shows nothing.
    """

    def __init__(self, console: Console, *, steps: int, done: int, visible: bool) -> None:
        self._console = console
        self._steps = steps
        self._visible = visible
        self._started = self._spoken = time.monotonic()
        self._first = done
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (visible and console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=steps, completed=done, figures="compiling")

    def update(self, step: int, bits_per_byte: float, tokens_per_second: float) -> None:
        """Shows the figures of the newest step.

        Args:
            step: Steps done.
            bits_per_byte: Training loss.
            tokens_per_second: Throughput.
        """
        figures = f"{bits_per_byte:.3f} bits/byte  {tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, figures=figures)
        now = time.monotonic()
        if step == self._first + 1:  # Compilation says nothing about the time left.
            self._started, self._first = now, step
        if self._visible and not self._console.is_terminal and now - self._spoken >= _SECONDS_BETWEEN_LINES:
            self._spoken = now
            left = (now - self._started) / max(step - self._first, 1) * (self._steps - step)
            self._console.print(f"step {step}/{self._steps}  {figures}  {left:.0f} s left")

    def note(self, text: str) -> None:
        """Shows a line of its own.

        Args:
            text: The line.
        """
        if self._visible:
            self._bar.console.print(text)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
