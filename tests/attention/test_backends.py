from functools import partial

import pytest

import zeco_jax
from tests.attention import cases
from tests.attention.contract import AnyPackingContract, Float64Contract, LinearAttentionContract

# The reference has one way to go, whatever the chunk size.
FEWER = tuple(case for case in cases.EVERY if "chunk_size" not in case.options)


class TestReference(AnyPackingContract):
    attend = staticmethod(partial(zeco_jax.linear_attention, backend="reference"))
    covers = FEWER


class TestXla(AnyPackingContract):
    attend = staticmethod(partial(zeco_jax.linear_attention, backend="xla"))


class TestBestAvailable(LinearAttentionContract):
    attend = staticmethod(zeco_jax.linear_attention)
    covers = cases.ESSENTIAL[1:3]


class TestReferenceFloat64(Float64Contract):
    attend = staticmethod(partial(zeco_jax.linear_attention, backend="reference"))


class TestXlaFloat64(Float64Contract):
    attend = staticmethod(partial(zeco_jax.linear_attention, backend="xla"))


@pytest.mark.gpu
class TestXlaOnGpu(LinearAttentionContract):
    attend = staticmethod(partial(zeco_jax.linear_attention, backend="xla"))


@pytest.mark.gpu
class TestBestAvailableOnGpu(LinearAttentionContract):
    attend = staticmethod(zeco_jax.linear_attention)
    covers = cases.ESSENTIAL
