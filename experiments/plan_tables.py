"""Plans of training steps as tables."""

import re
from collections.abc import Sequence
from typing import Any

from rich.table import Table

GIB = 1 << 30
# Purposes of collectives that attention doesn't need.
_OF_THE_REST = ("gradients", "other")
_SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_tokens(text: str) -> int:
    """A number of tokens as people write it: K, M and G are powers of 1024.

    Raises:
        ValueError: something else.

    Example:
        >>> parse_tokens("8M"), parse_tokens("1_000")
        (8388608, 1000)
    """
    match = re.fullmatch(r"([\d_]+)([kmg]?)", text.lower())
    if match is None or int(match[1]) < 1:
        raise ValueError(f"tokens: got {text!r}, expected a positive number such as 32768, 512K or 8M")
    return int(match[1]) * _SUFFIXES[match[2]]


def short_tokens(tokens: float) -> str:
    """The way back.

    Example:
        >>> short_tokens(8 << 20), short_tokens(1000), short_tokens(98304)
        ('8M', '1,000', '96K')
    """
    for suffix in ("g", "m", "k"):
        if tokens >= _SUFFIXES[suffix] and tokens % _SUFFIXES[suffix] == 0:
            return f"{int(tokens) // _SUFFIXES[suffix]}{suffix.upper()}"
    return f"{tokens:,.0f}"


def size(count: float) -> str:
    """Bytes with a unit.

    Example:
        >>> size(35 * 2**30), size(2**21), size(80)
        ('35.0 GiB', '2 MiB', '80 B')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def milliseconds(seconds: float) -> str:
    """Three digits, never in powers of ten.

    Example:
        >>> milliseconds(1.4637), milliseconds(0.0000312)
        ('1,464 ms', '0.0312 ms')
    """
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{float(f'{value:.3g}')} ms"


def detail(plan: dict[str, Any]) -> Table:
    """All about one plan."""
    request, memory = plan["request"], plan["memory"]
    table = Table(title=heading(plan), show_header=False, title_justify="left", pad_edge=False)
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify)
    _memory_rows(table, plan)
    table.add_section()
    for row in plan["traffic"]:
        _traffic_rows(table, row, plan)
    table.add_section()
    main = list(plan["times"])[-1]
    for name, times in plan["times"].items():
        table.add_row(
            f"step by the {name}",
            milliseconds(times["seconds"]),
            f"computing {milliseconds(times['work'])}, waiting {milliseconds(times['exposed'])}; "
            f"{times['tokens_per_second_per_device']:,.0f} tokens/s per device",
        )
    work = plan["work"]
    used = work["flops"] / plan["times"][main]["seconds"] / plan["chip"]["peak_flops"]
    table.add_row(
        "matrix products",
        f"{work['flops'] / 1e12:.0f} TFLOP",
        f"{100 * used:.0f}% of the peak; {work['bytes'] / 1e9:,.0f} GB to and from memory",
    )
    table.add_section()
    chip, link = plan["chip"], plan["link"]
    table.add_row(
        chip["name"],
        size(chip["memory"]),
        f"{chip['peak_flops'] / 1e12:.0f} TFLOP/s x {request['flops_fraction']}, {chip['memory_bandwidth'] / 1e9:,.0f} "
        f"GB/s x {request['memory_fraction']} ({chip['source']})",
    )
    table.add_row(
        link["name"],
        f"{link['bandwidth'] / 1e9:.0f} GB/s",
        f"{1e6 * link['permute_latency']:.1f} us a permute, {1e6 * link['hop_latency']:.1f} us a hop "
        f"({link['source']})",
    )
    if memory["total"] > memory["limit"]:
        table.caption = f"does not fit: {size(memory['total'])} of {size(memory['limit'])}"
    return table


def heading(plan: dict[str, Any]) -> str:
    """What was planned, in a line."""
    request = plan["request"]
    return (
        f"{request['model']} ({plan['parameters'] / 1e6:,.0f} M parameters), {request['batch']} x "
        f"{short_tokens(request['tokens'])} tokens over {request['topology']} ({plan['devices']} devices, "
        f"{short_tokens(plan['tokens_per_device'])} each), {request['strategy']}, {request['precision']}"
        f"{', remat' if request['remat'] else ''}"
    )


def _memory_rows(table: Table, plan: dict[str, Any]) -> None:
    memory = plan["memory"]
    fits = "fits" if memory["total"] <= memory["limit"] else "[red]does not fit[/red]"
    table.add_row("memory per device", size(memory["total"]), f"of {size(memory['limit'])}: {fits}")
    table.add_row("  parameters, optimizer, batch", size(memory["arguments"]), "")
    table.add_row("  temporaries", size(memory["temporaries"]), "at their peak, the largest:")
    for buffer in plan["buffers"][:8]:
        times = f"{buffer['count']} x " if buffer["count"] > 1 else ""
        table.add_row("", size(buffer["bytes"]), f"{times}{buffer['type']}  {short_source(buffer['source'])}")


def _traffic_rows(table: Table, row: dict[str, Any], plan: dict[str, Any]) -> None:
    times = "once" if row["exchanges"] == 1 else f"{row['exchanges']} x"
    what = f"{row['rounds']} {row['kinds'][0] if len(row['kinds']) == 1 else 'collectives'}"
    if row["purpose"] not in _OF_THE_REST:
        per_layer = row["exchanges"] / plan["layers"]
        times = f"{per_layer:g} a layer"
    exposed = "nothing exposed" if row["exposed"] < 1e-7 else f"{milliseconds(row['exposed'])} exposed"
    table.add_row(
        row["purpose"],
        size(row["bytes"]),
        f"per rank and step, {times}: {what}, {row['rounds_with_work']} with work beside them "
        f"({milliseconds(row['work_inside'])}); {milliseconds(row['wire'])} on the wire, {exposed}",
    )


def short_source(source: str) -> str:
    """The end of an operation's name, and whether it belongs to the backward pass."""
    if not source or not source.startswith("jit("):
        return f"({source})" if source else ""
    backward = "backward: " if "transpose(" in source else ""
    again = "recomputed: " if "rematted_computation" in source else ""
    words = [word for word in source.split("/") if word not in ("while", "body", "eval_jaxpr", "checkpoint")]
    names = [word for word in words if not word.startswith(("jit(train)", "jvp", "transpose(", "rematted"))]
    return f"({again or backward}{'/'.join(names[-2:]) or 'kept for the backward pass'})"


def comparison(plans: Sequence[dict[str, Any]], failures: dict[str, str]) -> Table:
    """Plans side by side, one row each; those that can't be had with the reason."""
    table = Table(title="side by side: per device and step", title_justify="left", pad_edge=False)
    for name in ("strategy", "topology", "tokens"):
        table.add_column(name, no_wrap=True)
    for name in ("memory", "attention sends", "rounds", "exposed", "gradients exposed", "step", "tokens/s"):
        table.add_column(name, justify="right")
    for plan in plans:
        states = [row for row in plan["traffic"] if row["purpose"] not in _OF_THE_REST]
        gradients = [row for row in plan["traffic"] if row["purpose"] == "gradients"]
        times = list(plan["times"].values())[-1]
        fits = plan["memory"]["total"] <= plan["memory"]["limit"]
        table.add_row(
            plan["request"]["strategy"],
            plan["request"]["topology"],
            short_tokens(plan["request"]["tokens"]),
            size(plan["memory"]["total"]) if fits else f"[red]{size(plan['memory']['total'])}[/red]",
            size(sum(row["bytes"] for row in states)),
            " + ".join(str(row["rounds"]) for row in states) or "-",
            milliseconds(sum(row["exposed"] for row in states)),
            milliseconds(sum(row["exposed"] for row in gradients)),
            milliseconds(times["seconds"]),
            f"{times['tokens_per_second_per_device']:,.0f}",
        )
    if failures:
        table.caption = "\n".join(f"{name}: {reason}" for name, reason in failures.items())
        table.caption_justify = "left"
    return table
