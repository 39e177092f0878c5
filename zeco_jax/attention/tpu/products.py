"""Matrix products on the matrix units: operands rounded to one type, sums in float32."""

import jax
import jax.numpy as jnp


def product(x: jax.Array, y: jax.Array, contracted: tuple[int, int], operand_dtype: jnp.dtype) -> jax.Array:
    """Contracts one axis of each of two matrices; float32 operands are multiplied as such, not rounded to bfloat16.

    Args:
        x: two axes.
        y: two axes.
        contracted: the axis of x and that of y.
        operand_dtype: what the matrix units multiply.

    Returns:
        The other axis of x by the other axis of y, float32.
    """
    precision = jax.lax.Precision.HIGHEST if jnp.dtype(operand_dtype) == jnp.float32 else None
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(
        x.astype(operand_dtype), y.astype(operand_dtype), axes, precision=precision, preferred_element_type=jnp.float32
    )
