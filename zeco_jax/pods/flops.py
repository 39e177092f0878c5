"""Multiplications and additions of the matrix products in a compiled program."""

import math
import re

import numpy as np

from zeco_jax.pods.program import Instruction, Program

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_GEMM = re.compile(r'"lhs_contracting_dimensions":\[([\d",]*)\]')
_ESTIMATE = re.compile(r'"cost_estimate":\{[^{}]*"flops":"?(\d+)')
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


def product_flops(program: Program, instruction: Instruction, computation: str) -> int:
    """Of one instruction and all that it calls; loops count as often as they run, as far as that is known.

    Of kernels written by hand, what they say of themselves (`cost_estimate` of `pallas_call`) is counted; of products
    that a GPU library computes, all.

    Args:
        program: where the instruction stands.
        instruction: any.
        computation: the computation that it stands in.
    """
    if estimate := _ESTIMATE.search(instruction.line):
        return int(estimate[1])
    if instruction.opcode in ("dot", "convolution", "custom-call"):
        named = program.named[computation]
        shapes = [named[name].shapes for name in instruction.operands if name in named]
        operands = [arrays[0] for arrays in shapes if arrays]
        if operands and instruction.shapes:
            return _own_flops(instruction, operands)
    inner = sum(
        product_flops(program, other, name)
        for name in instruction.called
        for other in program.computations.get(name, ())
    )
    return program.runs(instruction) * inner


def _own_flops(instruction: Instruction, operands: list[tuple[int, ...]]) -> int:
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, *operands[:2])
    contracted = (_CONTRACTED if instruction.opcode == "dot" else _GEMM).search(instruction.line)
    if contracted is None and instruction.opcode == "custom-call":
        return 0
    axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])] if contracted else []
    return 2 * math.prod(instruction.shapes[0]) * math.prod(operands[0][axis] for axis in axes)


def _convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Counts only products with real elements: the TPU compiler writes batches of products as padded convolutions."""
    labels = _LABELS.search(instruction.line)
    if labels is None:
        return 0
    left_names, right_names, out_names = labels.groups()
    out = instruction.shapes[0]
    window = _window(instruction.line)
    flops = 2 * right[right_names.index("i")] * out[out_names.index("b")] * out[out_names.index("f")]
    for name in filter(str.isdigit, out_names):
        sizes = (left[left_names.index(name)], right[right_names.index(name)], out[out_names.index(name)])
        flops *= _real_products(*sizes, **{key: values[int(name)] for key, values in window.items()})
    return flops


def _window(line: str) -> dict[str, list[int]]:
    """The attributes of a convolution's window, one number for each spatial dimension."""
    window = _WINDOW.search(line)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    dimensions = len(fields["size"].split("x")) if "size" in fields else 0

    def numbers(name: str, default: int) -> list[int]:
        # A padding reads "low_high", and either may be negative.
        return [int(n.split("_")[0]) for n in fields[name].split("x")] if name in fields else [default] * dimensions

    return {
        "stride": numbers("stride", 1),
        "padding": numbers("pad", 0),
        "left_dilation": numbers("lhs_dilate", 1),
        "right_dilation": numbers("rhs_dilate", 1),
    }


def _real_products(
    left: int, right: int, out: int, *, stride: int, padding: int, left_dilation: int, right_dilation: int
) -> int:
    """Pairs of an output and a window position that meet an element of the left side, not padding or a hole."""
    places = np.arange(out)[:, None] * stride - padding + np.arange(right)[None, :] * right_dilation
    inside = (places >= 0) & (places <= (left - 1) * left_dilation)
    return int(np.sum(inside & (places % left_dilation == 0)))
