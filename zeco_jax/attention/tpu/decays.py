"""The decays of a chunk, of whichever kind, as the kernels read them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from zeco_jax.attention.tpu.channel_decay import ChannelDecay
from zeco_jax.attention.tpu.pivot_decay import PivotDecay
from zeco_jax.attention.tpu.tiling import Tiling
from zeco_jax.attention.tpu.token_decay import TokenDecay
from zeco_jax.attention.tpu.tree_decay import TreeDecay

Decay = TokenDecay | PivotDecay | TreeDecay


def visit_heads(gates, tiling: Tiling, scale: float, visit: Callable[[int, Decay], None]) -> None:  # noqa: ANN001
    """Inside a kernel: calls `visit(head, decay)` for the heads of a step, with decays in the form that suits them.

    Args:
        gates: the gates themselves [C, heads K], or their sums as of `gate_sums` [parts heads, C], first all first
            parts.
        tiling: the cut.
        scale: factor on the outputs.
        visit: computes one head; where gates decide at run time, it is traced once for each form.
    """

    def visit_all(decays: list[Decay]) -> None:
        for head, decay in enumerate(decays):
            visit(head, decay)

    if not tiling.channel:
        visit_all(_token_decays(gates[...], tiling, scale))
        return
    if not PivotDecay.suits(tiling.dtype, tiling.tokens):
        visit_all(_channel_decays(TreeDecay, gates, tiling, scale))
        return
    is_mild = PivotDecay.are_mild(_channel_decays(PivotDecay, gates, tiling, scale))
    pl.when(is_mild)(lambda: visit_all(_channel_decays(PivotDecay, gates, tiling, scale)))
    pl.when(jnp.logical_not(is_mild))(lambda: visit_all(_channel_decays(TreeDecay, gates, tiling, scale)))


def state_decays(gates, tiling: Tiling, scale: float) -> list[TokenDecay] | list[ChannelDecay]:  # noqa: ANN001
    """Inside a kernel: decays that know how to add to a state and no more, one for each head."""
    if tiling.channel:
        return _channel_decays(ChannelDecay, gates, tiling, scale)
    return _token_decays(gates[...], tiling, scale)


def _channel_decays[Form: ChannelDecay](
    form: type[Form],
    gates,  # noqa: ANN001
    tiling: Tiling,
    scale: float,
) -> list[Form]:
    return [form(gates[:, tiling.key_slice(head)], scale, tiling.dtype) for head in range(tiling.heads_per_step)]


def _token_decays(rows: jax.Array, tiling: Tiling, scale: float) -> list[TokenDecay]:
    heads = tiling.heads_per_step
    columns = rows.T
    parts = range(rows.shape[0] // heads)

    def decay(head: int) -> TokenDecay:
        own = [part * heads + head for part in parts]
        return TokenDecay([rows[i : i + 1] for i in own], [columns[:, i : i + 1] for i in own], scale, tiling.dtype)

    return [decay(head) for head in range(heads)]
