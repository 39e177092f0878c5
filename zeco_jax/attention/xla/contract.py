"""Matrix products whose operands are rounded to one type while values and cotangents stay in full precision."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(subscripts: str, x: jax.Array, y: jax.Array, operand_dtype: jnp.dtype) -> jax.Array:
    """An einsum of two operands with products of `operand_dtype`, accumulated in x's dtype.

    JAX's own gradient would round the cotangents of low-precision operands once more, or multiply in a mixed
    precision that matrix units don't have.

    Args:
        subscripts: as for `jnp.einsum`, every letter of an operand either in the result or in the other operand.
        x: first operand, in the accumulation dtype.
        y: second operand, likewise.
        operand_dtype: what the matrix unit multiplies.
    """
    return _einsum(subscripts, x, y, operand_dtype)


def _einsum(subscripts: str, x: jax.Array, y: jax.Array, operand_dtype: jnp.dtype) -> jax.Array:
    # Without HIGHEST, float32 products are rounded to tf32 on GPUs and to bf16 on TPUs.
    precision = jax.lax.Precision.HIGHEST if jnp.dtype(operand_dtype).itemsize >= 4 else None
    x_low, y_low = x.astype(operand_dtype), y.astype(operand_dtype)
    return jnp.einsum(subscripts, x_low, y_low, precision=precision, preferred_element_type=x.dtype)


def _forward(
    subscripts: str, x: jax.Array, y: jax.Array, operand_dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _einsum(subscripts, x, y, operand_dtype), (x.astype(operand_dtype), y.astype(operand_dtype))


def _backward(
    subscripts: str, operand_dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, y = (operand.astype(cotangent.dtype) for operand in residuals)
    operands, result = subscripts.split("->")
    first, second = operands.split(",")
    dx = _einsum(f"{result},{second}->{first}", cotangent, y, operand_dtype)
    dy = _einsum(f"{result},{first}->{second}", cotangent, x, operand_dtype)
    return dx, dy


contract.defvjp(_forward, _backward)
