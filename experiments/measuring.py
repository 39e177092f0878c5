"""Times of programs that are to be compared: runs interleaved, so that whatever drifts hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Timing:
    """Seconds of a program over several runs, in the order of the rounds that they belong to."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the runs took longer."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between these two lies the middle half of the runs."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def divided_by(self, repeats: int) -> "Timing":
        """Seconds of one of the `repeats` that a run consists of."""
        return Timing(tuple(seconds / repeats for seconds in self.seconds))

    def over(self, other: "Timing") -> float:
        """How many times as long as `other`: the median over the rounds that both took part in.

        Example:
            >>> Timing((1.0, 2.0, 9.0)).over(Timing((1.0, 1.0)))
            1.5
        """
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=False))


def spread(timing: Timing) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, high = timing.quartiles
    return low, timing.median, high


def milliseconds(seconds: tuple[float, float, float]) -> str:
    """Median, and quartiles in parentheses.

    Example:
        >>> milliseconds((0.001, 0.002, 0.0123456))
        '2 (1-12.3)'
    """
    low, median, high = (1e3 * value for value in seconds)
    return f"{median:.3g} ({low:.3g}-{high:.3g})"


def seconds_of(run: Callable[[], object]) -> float:
    """One run, until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, budget: float, fewest: int = 3, most: int = 100
) -> dict[str, Timing]:
    """Rounds in each of which every program runs once, after a run of each that doesn't count.

    Programs share the budget; one that has used its share up sits out the later rounds. One whose first run took all of
    it, and twice as long as another's, is not run again: so long a run has no start worth leaving out.

    Args:
        runs: what to run, by name.
        budget: seconds for all of them together, which `fewest` may exceed.
        fewest: rounds that every program takes part in.
        most: rounds at most.
    """
    share = budget / len(runs)
    first = {name: seconds_of(run) for name, run in runs.items()}
    slow = {name for name, seconds in first.items() if seconds > max(share, 2 * min(first.values()))}
    seconds = {name: [first[name]] if name in slow else [] for name in runs}
    for turn in range(most):
        playing = [
            name for name in runs if name not in slow and (turn < fewest or sum(seconds[name]) < share)
        ]  # fmt: skip
        if not playing:
            break
        # Every other round backwards, so that no program always follows the same one.
        for name in playing if turn % 2 == 0 else reversed(playing):
            seconds[name].append(seconds_of(runs[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
