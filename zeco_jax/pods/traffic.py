"""What a program sends in one run, collectives that serve one purpose taken together."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from zeco_jax.pods.timeline import Wait

# What attention sends: ZeCO and its like states, Ulysses heads.
_EXCHANGED = ("states", "heads")
_ATTENTION = "jit(attend)"


class Traffic(NamedTuple):
    """The collectives of one purpose.

    Attributes:
        purpose: "states, forward", "states, backward", "states, forward again" (where rematerialisation repeats the
            exchange), the same with "heads" for the all-to-alls of Ulysses, "gradients" or "other".
        exchanges: how often they are gone through: for the states, once for each layer.
        rounds: collectives of one exchange.
        kinds: "collective-permute", "all-reduce", ...
        bytes: that the busiest rank sends.
        wire: seconds on the wire.
        exposed: of those, seconds in which a device waits.
        work_inside: seconds of independent work between the starts and the ends.
        rounds_with_work: rounds of one exchange beside which anything runs.
    """

    purpose: str
    exchanges: int
    rounds: int
    kinds: tuple[str, ...]
    bytes: int
    wire: float
    exposed: float
    work_inside: float
    rounds_with_work: int


def traffic_in(waits: Iterable[Wait]) -> list[Traffic]:
    """Sums up the collectives of a timeline by purpose, those of the states first.

    Args:
        waits: `timeline(...).waits`.
    """
    groups: dict[str, list[Wait]] = {}
    for wait in waits:
        groups.setdefault(_purpose(wait), []).append(wait)
    exchanges = [f"{what}, {way}" for what in _EXCHANGED for way in ("forward", "forward again", "backward")]
    return [_sum(purpose, groups[purpose]) for purpose in (*exchanges, "gradients", "other") if purpose in groups]


def _purpose(wait: Wait) -> str:
    source = wait.collective.source
    backward = "transpose(" in source
    what = "states" if _ATTENTION in source else "heads" if "all_to_all" in source else None
    if what is None:
        return "gradients" if backward else "other"
    again = "rematted_computation" in source.partition(_ATTENTION)[0]
    return f"{what}, {'forward again' if again else 'backward' if backward else 'forward'}"


def _sum(purpose: str, waits: list[Wait]) -> Traffic:
    sent: Counter[int] = Counter()
    by_all = 0
    for wait in waits:
        for source, _ in wait.collective.pairs:
            sent[source] += wait.runs * wait.collective.bytes
        by_all += 0 if wait.collective.pairs else wait.runs * wait.collective.wire_bytes
    # A round of a schedule is like no other; what comes twice belongs to a second exchange in the same place.
    alike = Counter(
        (wait.computation, wait.collective.kind, wait.collective.bytes, wait.collective.pairs) for wait in waits
    )
    repeated = min(alike.values()) if purpose.startswith("states") else 1
    places = {wait.computation: wait.runs for wait in waits}
    rounds = Counter(wait.computation for wait in waits)
    working = Counter(wait.computation for wait in waits if wait.hidden_by > 0)
    return Traffic(
        purpose=purpose,
        exchanges=repeated * sum(places.values()),
        rounds=max(rounds.values()) // repeated,
        kinds=tuple(dict.fromkeys(wait.collective.kind for wait in waits)),
        bytes=by_all + max(sent.values(), default=0),
        wire=sum(wait.wire for wait in waits),
        exposed=sum(wait.exposed for wait in waits),
        work_inside=sum(wait.hidden_by for wait in waits),
        rounds_with_work=max(working.values(), default=0) // repeated,
    )
