"""Which of a program's matrix products must wait for an exchange, read from its jaxpr."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


class Flops(NamedTuple):
    """Multiplications and additions of the matrix products that need the exchange, and of those that don't."""

    waiting: int
    free: int

    def __add__(self, other):
        return Flops(self.waiting + other.waiting, self.free + other.free)


def waiting_flops(function: Callable, *arguments, reverse: bool = False) -> Flops:
    """Count the products of one rank, by whether they depend on a `ppermute` to the right (`reverse`: to the left).

    A loop waits as a whole as soon as one of its inputs does.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return _walk(jaxpr, [False] * len(jaxpr.invars), reverse)[1]


def _walk(jaxpr: Jaxpr, inputs: list[bool], reverse: bool) -> tuple[list[bool], Flops]:
    waits = dict(zip(jaxpr.invars, inputs, strict=True))
    total = Flops(0, 0)

    def is_waiting(variable):
        return not isinstance(variable, Literal) and waits.get(variable, False)

    for equation in jaxpr.eqns:
        arguments = [is_waiting(variable) for variable in equation.invars]
        results = [any(arguments)] * len(equation.outvars)
        inner = _inner(equation)
        if equation.primitive.name == "ppermute":
            moves_left = any(target < source for source, target in equation.params["perm"])
            results = [any(arguments) or moves_left == reverse]
        elif equation.primitive.name == "dot_general":
            flops = _dot_flops(equation)
            total += Flops(flops, 0) if any(arguments) else Flops(0, flops)
        elif equation.primitive.name == "scan":
            (body,) = inner
            _, flops = _walk(body, [any(arguments)] * len(body.invars), reverse)
            total += Flops(*(equation.params["length"] * count for count in flops))
        elif equation.primitive.name in ("while", "cond"):
            raise NotImplementedError(f"{equation.primitive.name} in {equation}")
        elif inner:
            (body,) = inner
            results, flops = _walk(body, arguments, reverse)
            total += flops
        waits.update(zip(equation.outvars, results, strict=True))
    return [is_waiting(variable) for variable in jaxpr.outvars], total


def _inner(equation) -> list[Jaxpr]:
    values = [equation.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in equation.params]
    return [value.jaxpr if isinstance(value, ClosedJaxpr) else value for value in values]


def _dot_flops(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    operand, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return 2 * math.prod(result) * math.prod(operand[axis] for axis in contracted)
