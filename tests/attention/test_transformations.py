"""jit, grad, vmap, checkpoint and scan around the operator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zeco_jax
from tests import agreement, oracle
from tests.attention import cases

CASE = cases.Case("transformations", regimes=("near_one", "gla"), tokens=40, value_width=8)


@pytest.fixture
def arrays():
    return cases.arrays(CASE)


@pytest.fixture
def want(arrays):
    return oracle.recurrence(**arrays.differentiable, dout=arrays.dout, dfinal=arrays.dfinal)


def loss(arguments, arrays):
    out, final_state = zeco_jax.linear_attention(**arguments)
    return jnp.sum(out * arrays.dout) + jnp.sum(final_state * arrays.dfinal)


def assert_gradients_agree(gradients, want):
    for name, gradient in gradients.items():
        agreement.assert_agrees(f"d{name}", gradient, want.gradients[name])


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable], ids=["nothing", "everything"])
def test_checkpoint(arrays, want, policy):
    run = jax.jit(jax.grad(jax.checkpoint(lambda arguments: loss(arguments, arrays), policy=policy)))
    assert_gradients_agree(run(arrays.differentiable), want)


def test_vmap_of_the_gradient(arrays, want):
    """Mapped over a batch of its own, [G, B, ...]."""
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), arrays.differentiable)
    gradients = jax.jit(jax.vmap(jax.grad(lambda arguments: loss(arguments, arrays))))(stacked)
    for group in range(2):
        assert_gradients_agree(jax.tree.map(lambda x, group=group: x[group], gradients), want)


def test_vmap_with_shared_keys(arrays):
    """Only q is mapped."""
    q = jnp.stack([arrays.differentiable["q"], 2 * arrays.differentiable["q"]])
    rest = {name: x for name, x in arrays.differentiable.items() if name != "q"}
    out, _ = jax.jit(jax.vmap(lambda q: zeco_jax.linear_attention(q=q, **rest)))(q)
    agreement.assert_agrees("out", out[1], 2 * np.asarray(out[0]))


def test_scan_over_stretches_equals_one_call(arrays, want):
    """final_state of one stretch is initial_state of the next, gradients included."""
    cut = {name: x for name, x in arrays.differentiable.items() if name != "initial_state"}

    def whole(arguments):
        stretches = {name: jnp.moveaxis(x.reshape(2, 4, 10, *x.shape[2:]), 1, 0) for name, x in cut_of(arguments)}

        def step(state, stretch):
            out, state = zeco_jax.linear_attention(**stretch, initial_state=state)
            return state, out

        final_state, out = jax.lax.scan(step, arguments["initial_state"], stretches)
        out = jnp.moveaxis(out, 0, 1).reshape(arrays.dout.shape)
        return jnp.sum(out * arrays.dout) + jnp.sum(final_state * arrays.dfinal)

    def cut_of(arguments):
        return [(name, arguments[name]) for name in cut]

    assert_gradients_agree(jax.jit(jax.grad(whole))(arrays.differentiable), want)


def test_token_by_token_equals_one_call(arrays, want):
    """A decode loop: T = 1, the state handed on."""
    state = arrays.differentiable["initial_state"]
    step = jax.jit(zeco_jax.linear_attention)
    outs = []
    for t in range(CASE.tokens):
        token = {name: arrays.differentiable[name][:, t : t + 1] for name in ("q", "k", "v", "log_decay")}
        out, state = step(**token, initial_state=state)
        outs.append(out)
    agreement.assert_agrees("out", jnp.concatenate(outs, 1), want.out)
    agreement.assert_agrees("final_state", state, want.final_state)


def test_gradient_of_one_argument_only(arrays, want):
    rest = {name: x for name, x in arrays.differentiable.items() if name != "log_decay"}
    run = jax.jit(jax.grad(lambda log_decay: loss({**rest, "log_decay": log_decay}, arrays)))
    gradient = run(arrays.differentiable["log_decay"])
    agreement.assert_agrees("dlog_decay", gradient, want.gradients["log_decay"])


def test_mixed_dtypes():
    """bf16 values with fp32 queries and keys: the output follows v, the state is fp32."""
    arrays = cases.arrays(CASE).differentiable
    arrays["v"] = arrays["v"].astype("bfloat16")
    out, final_state = jax.jit(zeco_jax.linear_attention)(**arrays)
    want = oracle.recurrence(**arrays)
    assert out.dtype == "bfloat16"
    agreement.assert_agrees("out", out, want.out, "bfloat16")
    agreement.assert_agrees("final_state", final_state, want.final_state, "float32")


def test_bfloat16_initial_state():
    """A state from a bf16 cache is taken as it is; its gradient has its dtype."""
    arrays = cases.arrays(CASE)
    arguments = {**arrays.differentiable, "initial_state": arrays.differentiable["initial_state"].astype("bfloat16")}
    gradient = jax.jit(jax.grad(lambda arguments: loss(arguments, arrays)))(arguments)["initial_state"]
    want = oracle.recurrence(**arguments, dout=arrays.dout, dfinal=arrays.dfinal)
    assert gradient.dtype == "bfloat16"
    agreement.assert_agrees("dinitial_state", gradient, want.gradients["initial_state"], "bfloat16")
