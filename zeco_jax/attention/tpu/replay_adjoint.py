"""Kernel: the gradients of the replay, from each chunk's entering state and the cotangent of its leaving one."""

from jax.experimental import pallas as pl

from zeco_jax.attention.tpu.decays import Decay, visit_heads
from zeco_jax.attention.tpu.tiling import Tiling


def replay_adjoint_kernel(
    q,  # noqa: ANN001
    k,  # noqa: ANN001
    v,  # noqa: ANN001
    gates,  # noqa: ANN001
    dout,  # noqa: ANN001
    entering,  # noqa: ANN001
    start,  # noqa: ANN001
    dq,  # noqa: ANN001
    dk,  # noqa: ANN001
    dv,  # noqa: ANN001
    dgates,  # noqa: ANN001
    dstate,  # noqa: ANN001
    *,
    tiling: Tiling,
    scale: float,
) -> None:
    r"""One chunk, visited from the last to the first, with :math:`dS \leftarrow e^{b_C} \odot dS + Q'^\top dO`.

    Args:
        q: [C, heads K].
        k: [C, heads K].
        v: [C, heads V].
        gates: see `visit_heads`.
        dout: [C, heads V].
        entering: [heads, V, K], the state that enters this chunk, in the type of q.
        start: [heads, V, K], the cotangent of the state that leaves the last chunk.
        dq: [C, heads K], written.
        dk: [C, heads K], written.
        dv: [C, heads V], written.
        dgates: written: [heads, C], or [C, heads K] where every key channel has a gate.
        dstate: [heads, V, K], written: the cotangent of the state that enters.
        tiling: the cut.
        scale: factor on the outputs.
    """

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        dstate[...] = start[...]

    def visit(head: int, decay: Decay) -> None:
        keys, values = tiling.key_slice(head), tiling.value_slice(head)
        q_head, dout_head, dleaving = q[:, keys], dout[:, values], dstate[head]
        dq_head, dk_head, dv_head, dgates_head = decay.adjoint(
            q_head, k[:, keys], v[:, values], dout_head, entering[head], dleaving
        )
        dq[:, keys] = dq_head.astype(dq.dtype)
        dk[:, keys] = dk_head.astype(dk.dtype)
        dv[:, values] = dv_head.astype(dv.dtype)
        if tiling.channel:
            dgates[:, keys] = dgates_head
        else:
            dgates[head : head + 1, :] = dgates_head
        dstate[head] = decay.decay_state(dleaving) + decay.added_cotangent(q_head, dout_head)

    visit_heads(gates, tiling, scale, visit)
