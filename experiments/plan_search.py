"""The longest sequence whose step fits."""

from collections.abc import Callable
from typing import NamedTuple

# From the first length to the second, without a line that tells: far enough that small things don't bend it.
_LEAP = 4


class Tried(NamedTuple):
    """One length that was compiled.

    Attributes:
        units: length, in units.
        bytes: memory that it takes.
    """

    units: int
    bytes: int


def longest(memory_of: Callable[[int], int], limit: int, start: int, precision: float = 0.02) -> list[Tried]:
    """Looks for the largest number of units whose memory stays within a limit.

    Memory grows by about as much with each unit, so that a line through two tries tells where to try next; what is
    compiled decides. Stops when a length fits and one that is longer by `precision` (at least by one unit) doesn't.

    Args:
        memory_of: bytes for a number of units.
        limit: bytes.
        start: where to begin, in units.
        precision: share of the length.

    Returns:
        All tries in their order; the largest that fits is the answer.

    Raises:
        ValueError: not even one unit fits.

    Example:
        >>> tries = longest(lambda units: 10 + 3 * units, limit=100, start=4)
        >>> max(tried.units for tried in tries if tried.bytes <= 100)
        30
    """
    tries: list[Tried] = []
    lower, upper, units = 0, 0, max(start, 1)
    while True:
        tries.append(Tried(units, memory_of(units)))
        if tries[-1].bytes <= limit:
            lower = units
        else:
            upper = units
        if upper == 1:
            raise ValueError("tokens: not even the shortest sequence fits")
        step = max(1, int(precision * lower))
        if upper and upper - lower <= step:
            return tries
        guess = _on_the_line(tries, limit)
        if guess == lower:
            guess += step
        if guess is None or not lower < guess < (upper or guess + 1):
            guess = (lower + upper) // 2 if upper else _LEAP * lower
        units = guess


def _on_the_line(tries: list[Tried], limit: int) -> int | None:
    """Units at which the line through the two tries nearest to the limit meets it."""
    known = sorted(tries, key=lambda tried: abs(tried.bytes - limit))
    if len(known) < 2 or known[0].bytes == known[1].bytes:
        return None
    (units, size), (other_units, other_size) = known[:2]
    return int(units + (limit - size) * (other_units - units) / (other_size - size))
