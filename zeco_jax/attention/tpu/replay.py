"""Kernel: the outputs, from the state that enters."""

from jax.experimental import pallas as pl

from zeco_jax.attention.tpu.decays import Decay, visit_heads
from zeco_jax.attention.tpu.tiling import Tiling


def replay_kernel(
    q,  # noqa: ANN001
    k,  # noqa: ANN001
    v,  # noqa: ANN001
    gates,  # noqa: ANN001
    start,  # noqa: ANN001
    out,  # noqa: ANN001
    state,  # noqa: ANN001
    *,
    tiling: Tiling,
    scale: float,
) -> None:
    r"""One chunk of :math:`O = A V + Q' S`, :math:`S \leftarrow e^{b_C} \odot S + K'^\top V`, states as [V, K].

    Args:
        q: [C, heads K].
        k: [C, heads K].
        v: [C, heads V].
        gates: see `visit_heads`.
        start: [heads, V, K], the state before the first chunk.
        out: [C, heads V], written.
        state: [heads, V, K], written: what has been left so far.
        tiling: the cut.
        scale: factor on the outputs.
    """

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state[...] = start[...]

    def visit(head: int, decay: Decay) -> None:
        keys, values = tiling.key_slice(head), tiling.value_slice(head)
        k_head, v_head, before = k[:, keys], v[:, values], state[head]
        out[:, values] = decay.outputs(q[:, keys], k_head, v_head, before).astype(out.dtype)
        state[head] = decay.decay_state(before) + decay.added_state(k_head, v_head)

    visit_heads(gates, tiling, scale, visit)
