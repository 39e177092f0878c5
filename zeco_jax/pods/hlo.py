"""What a compiled program sends: its collectives, read from the text of its HLO."""

import math
import re
from dataclasses import dataclass

import numpy as np

from zeco_jax.pods.program import COMPUTATION

_KINDS = "collective-permute|all-gather|all-reduce|all-to-all|ragged-all-to-all|reduce-scatter|collective-broadcast"
# "%name = type operation(operands), attributes"; a type may be a tuple with layouts in braces.
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_FUSED = re.compile(r" fusion\(.*?\bcalls=%?([\w.-]+)")
_ARRAY = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_PAIR = re.compile(r"\{(\d+),(\d+)\}")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_SOURCE = re.compile(r'\bop_name="([^"]*)"')
# Ranks that take part together: {{0,1},{2,3}}, [2,2]<=[4], or mesh['data'=2,'seq'=2] {'seq'}.
_LISTED = re.compile(r"\breplica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"\breplica_groups=\[\d+,(\d+)\]<=")
_NAMED = re.compile(r"\breplica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_AXIS = re.compile(r"'([^']*)'=(\d+)")
# Of a part of an axis the size is given: 'seq':(2)4.
_MEMBER = re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")


@dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program.

    Attributes:
        name: the HLO instruction's name.
        kind: "collective-permute", "all-gather", "all-reduce", "all-to-all", "reduce-scatter", ...
        bytes: size of the result on one device.
        pairs: (source, target) devices of a collective-permute; empty for the other kinds.
        asynchronous: whether it is split in a start and a done, between which other work may run.
        group: ranks that take part in it together; 0 for a collective-permute, or if the text doesn't say.
        source: what the program calls the operation, such as "jit(train)/jvp()/shard_map/ppermute".
    """

    name: str
    kind: str
    bytes: int
    pairs: tuple[tuple[int, int], ...]
    asynchronous: bool
    group: int = 0
    source: str = ""

    @property
    def wire_bytes(self) -> int:
        """What a rank that takes part sends at least, whatever the algorithm.

        A part of the result for each other rank of an all-gather or all-to-all; of a reduction one for each other rank,
        and as much again if everybody is to have all of it.
        """
        others = (self.group - 1) / self.group if self.group else 1.0
        if self.kind == "all-reduce":
            return round(2 * self.bytes * others)
        if self.kind == "reduce-scatter":
            return self.bytes * (self.group - 1)
        return self.bytes if self.kind == "collective-permute" else round(self.bytes * others)


def collectives_in(compiled_text: str) -> list[Collective]:
    """The collectives of a compiled program in the order of its text, which is the schedule if it is scheduled.

    A collective in the body of a loop is listed once, however often the loop runs.

    Args:
        compiled_text: `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
        One record for each collective; the parts of an asynchronous one count once.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> from zeco_jax.pods import collectives_in
        >>> mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=jax.devices()[:2])
        >>> send = jax.shard_map(lambda x: jax.lax.ppermute(x, "x", [(0, 1)]), mesh=mesh, in_specs=P("x"),
        ...                      out_specs=P("x"))
        >>> text = jax.jit(send).lower(jnp.ones((8, 4))).compile().as_text()
        >>> [(c.kind, c.bytes, c.pairs) for c in collectives_in(text)]
        [('collective-permute', 64, ((0, 1),))]
    """
    found = []
    fused = set(_FUSED.findall(compiled_text))
    computation, threaded = "", set()
    for line in compiled_text.splitlines():
        if header := COMPUTATION.match(line):
            computation = header["name"]
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        if computation in fused and (channel := _CHANNEL.search(line)):
            # The TPU compiler repeats a collective in each of the fusions that it threads it through.
            if channel[1] in threaded:
                continue
            threaded.add(channel[1])
        arrays = [array_bytes(*array) for array in _ARRAY.findall(match["type"])]
        pairs = _PAIRS.search(line)
        # The start of an asynchronous pair carries its operand, its result and context words.
        size = arrays[min(1, len(arrays) - 1)] if match["start"] else sum(arrays)
        found.append(
            Collective(
                name=match["name"],
                kind=match["kind"],
                bytes=size,
                pairs=tuple((int(a), int(b)) for a, b in _PAIR.findall(pairs[1])) if pairs else (),
                asynchronous=bool(match["start"]) or computation in fused,
                group=_group(line),
                source=source_of(line),
            )
        )
    return found


def permuted_bytes(collectives: list[Collective], device: int) -> int:
    """Bytes that `device` sends through collective-permutes."""
    return sum(c.bytes for c in collectives for source, _ in c.pairs if source == device)


def source_of(line: str) -> str:
    """What the program calls the operation that a line of HLO stands for; empty if it doesn't say."""
    source = _SOURCE.search(line)
    return source[1] if source else ""


def _group(line: str) -> int:
    """Ranks in each of the groups that work together; 0 if the line names none."""
    if listed := _LISTED.search(line):
        return listed[1].count(",") + 1
    if counted := _COUNTED.search(line):
        return int(counted[1])
    named = _NAMED.search(line)
    if named is None:
        return 0
    sizes = dict(_AXIS.findall(named[1]))
    return math.prod(int(part or sizes[name]) for name, part in _MEMBER.findall(named[2]))


def array_bytes(dtype: str, dimensions: str) -> int:
    """Of an array that HLO writes as `dtype[dimensions]`."""
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return int(np.prod([int(d) for d in dimensions.split(",") if d], dtype=np.int64)) * bits // 8
