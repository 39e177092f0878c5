"""Which temporaries are alive when most of them are."""

import jax
import jax.numpy as jnp
import pytest

from zeco_jax.pods import compile_step
from zeco_jax.pods.memory import MemoryUse, peak_buffers

ASSIGNMENT = """BufferAssignment:
allocation 0: size 400, page 0, parameter 0, shape |f32[100]| at ShapeIndex {}:
 value: <1 p @0> (size=400,offset=0): f32[100]{0}
allocation 1: size 900, color 1, page 0, preallocated-temp:
 value: <2 on_the_chip @1> (size=900,offset=0): f32[225]{0:S(1)}
allocation 2: size 700, page 0, preallocated-temp:
 value: <3 early @0> (size=300,offset=0): f32[75]{0:T(128)}
 value: <4 late{1} (phi) @0> (size=200,offset=0): f32[50]{0:T(128)}
 value: <5 same_place @0> (size=200,offset=0): f32[2,25]{1,0}
 value: <6 also @0> (size=200,offset=200): f32[50]{0:T(128)}
 value: <7 other @0> (size=300,offset=400): bf16[150]{0}
"""
RANGES = """HloLiveRange (max 9):
  BufferLiveRange:
    early{}:0-3
    late{1}:4-9
    same_place{}:5-6
    also{}:4-9
    other{}:5-9
"""
TEXT = '  %also = f32[50]{0} add(%x, %y), metadata={op_name="jit(f)/add"}\n'


def test_values_that_share_a_place_count_once():
    buffers = peak_buffers(ASSIGNMENT, RANGES, TEXT)
    assert [(buffer.type, buffer.count, buffer.bytes) for buffer in buffers] == [
        ("f32[50]", 2, 400),
        ("bf16[150]", 1, 300),
    ]
    assert [buffer.source for buffer in buffers] == ["jit(f)/add", ""]


def test_without_a_report_nothing_is_known():
    assert peak_buffers("", "") == ()


def test_donated_arguments_count_once():
    assert MemoryUse(arguments=100, outputs=80, aliased=70, temporaries=30, code=5).total == 145


@pytest.mark.parametrize("tokens", [256, 1024])
def test_the_largest_temporaries_of_a_program_make_up_its_peak(tokens):
    def loss(w, x):
        return jnp.sum(jax.nn.relu(x @ w) @ w.T)

    step = compile_step(jax.jit(jax.grad(loss)).lower(jnp.ones((64, 256)), jnp.ones((tokens, 64))))
    assert sum(buffer.bytes for buffer in step.buffers) == pytest.approx(step.memory.temporaries, rel=0.02)
    assert step.buffers[0].type == f"f32[{tokens},256]"
