"""What a compiled program sends: its collectives, read from the text of its HLO."""

import re
from dataclasses import dataclass

import numpy as np

_KINDS = "collective-permute|all-gather|all-reduce|all-to-all|ragged-all-to-all|reduce-scatter|collective-broadcast"
# "%name = type operation(operands), attributes"; a type may be a tuple with layouts in braces.
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_PAIR = re.compile(r"\{(\d+),(\d+)\}")


@dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program.

    Attributes:
        name: the HLO instruction's name.
        kind: "collective-permute", "all-gather", "all-reduce", "all-to-all", "reduce-scatter", ...
        bytes: size of the result on one device.
        pairs: (source, target) devices of a collective-permute; empty for the other kinds.
        asynchronous: whether it is split in a start and a done, between which other work may run.
    """

    name: str
    kind: str
    bytes: int
    pairs: tuple[tuple[int, int], ...]
    asynchronous: bool


def collectives_in(compiled_text: str) -> list[Collective]:
    """The collectives of a compiled program in the order of its text, which is the schedule if it is scheduled.

    A collective in the body of a loop is listed once, however often the loop runs.

    Args:
        compiled_text: `jax.jit(f).lower(...).compile().as_text()`.

    Returns:
        One record for each collective; the two halves of an asynchronous one count once.

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
    for line in compiled_text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        arrays = [_array_bytes(*array) for array in _ARRAY.findall(match["type"])]
        pairs = _PAIRS.search(line)
        # The start of an asynchronous pair carries its operand, its result and context words.
        size = arrays[min(1, len(arrays) - 1)] if match["start"] else sum(arrays)
        found.append(
            Collective(
                name=match["name"],
                kind=match["kind"],
                bytes=size,
                pairs=tuple((int(a), int(b)) for a, b in _PAIR.findall(pairs[1])) if pairs else (),
                asynchronous=bool(match["start"]),
            )
        )
    return found


def permuted_bytes(collectives: list[Collective], device: int) -> int:
    """Bytes that `device` sends through collective-permutes."""
    return sum(c.bytes for c in collectives for source, _ in c.pairs if source == device)


def _array_bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return int(np.prod([int(d) for d in dimensions.split(",") if d], dtype=np.int64)) * bits // 8
