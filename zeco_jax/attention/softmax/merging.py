"""Online softmax: two blocks of keys as one."""

import jax
import jax.numpy as jnp

Partial = tuple[jax.Array, jax.Array]


def merge(one: Partial, other: Partial) -> Partial:
    r"""Attention to the keys of both blocks, from the attention to each.

    .. math:: \ell = \log(e^{\ell_1} + e^{\ell_2}), \qquad o = e^{\ell_1 - \ell} o_1 + e^{\ell_2 - \ell} o_2

    Args:
        one: out [..., V] and log_sum_exp [...], -inf where nothing was seen.
        other: the same for the other block.

    Returns:
        out and log_sum_exp, in log_sum_exp's dtype or a wider one.

    References:
        FlashAttention, arXiv 2205.14135, section 3.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from zeco_jax.attention.softmax import merge
        >>> nothing = jnp.zeros(1), jnp.array(-jnp.inf)
        >>> out, log_sum_exp = merge((jnp.array([3.0]), jnp.array(0.0)), nothing)
        >>> out.item(), log_sum_exp.item()
        (3.0, 0.0)
    """
    (one_out, one_log), (other_out, other_log) = one, other
    log_sum_exp = jnp.logaddexp(one_log, other_log)
    # Any finite number does where neither saw anything.
    whole = jnp.where(log_sum_exp == -jnp.inf, 0, log_sum_exp)
    weights = jnp.exp(one_log - whole), jnp.exp(other_log - whole)
    return weights[0][..., None] * one_out + weights[1][..., None] * other_out, log_sum_exp
