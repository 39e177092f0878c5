"""Kernel: the state that a walk over all chunks leaves, from either end."""

from jax.experimental import pallas as pl

from zeco_jax.attention.tpu.decays import state_decays
from zeco_jax.attention.tpu.tiling import Tiling


def state_walk_kernel(
    x,  # noqa: ANN001
    y,  # noqa: ANN001
    gates,  # noqa: ANN001
    start,  # noqa: ANN001
    state,  # noqa: ANN001
    entering=None,  # noqa: ANN001
    *,
    tiling: Tiling,
    scale: float,
    reverse: bool,
) -> None:
    r"""One chunk of :math:`S \leftarrow e^{b_C} \odot S + y^\top x'`, with the states transposed to [V, K].

    Forwards x is k and y is v, and x' is k decayed to the chunk's end. In reverse x is q and y is dout, and x' is q
    decayed from the chunk's start.

    Args:
        x: [C, heads K].
        y: [C, heads V].
        gates: see `visit_heads`.
        start: [heads, V, K], the state before the first visit.
        state: [heads, V, K], written: what has been left so far.
        entering: [heads, V, K] or None, written: the state that enters this chunk.
        tiling: the cut.
        scale: factor on x in reverse.
        reverse: whether the walk began with the last chunk.
    """

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state[...] = start[...]

    for head, decay in enumerate(state_decays(gates, tiling, scale)):
        before = state[head]
        if entering is not None:
            entering[head] = before.astype(entering.dtype)
        x_head, y_head = x[:, tiling.key_slice(head)], y[:, tiling.value_slice(head)]
        added = decay.added_cotangent(x_head, y_head) if reverse else decay.added_state(x_head, y_head)
        state[head] = decay.decay_state(before) + added
