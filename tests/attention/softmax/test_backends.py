"""The XLA backend against the oracle, and which backend is chosen."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tests.attention.softmax import cases
from tests.attention.softmax.contract import SoftmaxBackendContract
from zeco_jax.attention.softmax import XlaSoftmaxBackend, make_softmax_backend


class TestXla(SoftmaxBackendContract):
    """In blocks that the sequence fills several times, the last one not wholly."""

    backend = XlaSoftmaxBackend(block_size=16)


class TestXlaDefault(SoftmaxBackendContract):
    backend = XlaSoftmaxBackend()
    covers = (cases.GROUPED, replace(cases.GROUPED, name="bfloat16", dtype="bfloat16"))


class TestXlaFloat64(SoftmaxBackendContract):
    """Where a wrong formula cannot hide behind rounding."""

    backend = XlaSoftmaxBackend(block_size=16)
    covers = (replace(cases.GROUPED, name="float64", dtype="float64"),)
    split = covers[0]

    @pytest.fixture(autouse=True)
    def _double_precision(self):
        with jax.enable_x64(True):
            yield


X = jnp.zeros((1, 4, 2, 8))


def test_best_that_can_serve_is_chosen(caplog):
    caplog.set_level(logging.INFO, logger="zeco_jax")
    assert make_softmax_backend(None, X, X, X) == XlaSoftmaxBackend()
    assert "'cudnn' can't serve this call: needs an NVIDIA GPU" in caplog.text


def test_reason_of_the_one_asked_for():
    with pytest.raises(NotImplementedError, match="'cudnn' can't serve this call: needs an NVIDIA GPU"):
        make_softmax_backend("cudnn", X, X, X)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"(?s)\bbackend 'splash'.*'cudnn', 'xla'"):
        make_softmax_backend("splash", X, X, X)


def test_blocks_of_other_documents_are_left_out():
    """Numbers that would spoil every sum they are part of, with a weight of 0 as well."""
    documents = jnp.repeat(jnp.arange(2), 16)[None]
    spoiled = jnp.where(documents == 0, jnp.nan, 1.0)[..., None, None] * jnp.ones((1, 32, 2, 8))
    options = {"scale": 1.0, "causal": False, "query_documents": documents, "key_documents": documents}
    backend = XlaSoftmaxBackend(block_size=16)
    out, log_sum_exp = backend.attend(spoiled, spoiled, spoiled, **options)
    gradients = backend.adjoint(spoiled, spoiled, spoiled, out, log_sum_exp, spoiled, **options)
    for x in (out, *gradients):
        assert jnp.isfinite(x[:, 16:]).all()
        assert jnp.isnan(x[:, :16]).all()


def test_scores_of_all_tokens_never_exist_at_once():
    tokens, width = 8192, 16
    x = jax.ShapeDtypeStruct((1, tokens, 1, width), jnp.float32)
    backend = XlaSoftmaxBackend()

    def run(q, k, v, dout):
        out, log_sum_exp = backend.attend(q, k, v, scale=1.0, causal=True)
        return backend.adjoint(q, k, v, out, log_sum_exp, dout, scale=1.0, causal=True)

    memory = jax.jit(run).lower(x, x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tokens * tokens * 4 / 16
