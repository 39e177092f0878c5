"""Bytes that instructions move, of which fusions often move less than their operands hold."""

import pytest

from zeco_jax.pods.bytes import memory_bytes, type_bytes
from zeco_jax.pods.program import parse_program

FUSED = """HloModule m, is_scheduled=true

%slice_in (p: f32[24,1024], i: s32[]) -> f32[1,1024] {
  %p = f32[24,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %same = f32[24,1024]{1,0} bitcast(%p)
  ROOT %piece = f32[1,1024]{1,0} dynamic-slice(%same, %i), dynamic_slice_sizes={1,1024}
}

%put_in (p: f32[24,1024], x: f32[1,1024], i: s32[]) -> f32[24,1024] {
  %p = f32[24,1024]{1,0} parameter(0)
  %x = f32[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %put = f32[24,1024]{1,0} dynamic-update-slice(%p, %x, %i)
}

%double (p: f32[24,1024]) -> f32[24,1024] {
  %p = f32[24,1024]{1,0} parameter(0)
  ROOT %sum = f32[24,1024]{1,0} add(%p, %p)
}

%nested (p: f32[24,1024], i: s32[]) -> f32[1,1024] {
  %p = f32[24,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %inner = f32[1,1024]{1,0} fusion(%p, %i), kind=kLoop, calls=%slice_in
}

ENTRY %e (a: f32[24,1024], i: s32[]) -> f32[24,1024] {
  %a = f32[24,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %near = f32[24,1024]{1,0:T(8,128)S(1)} copy(%a)
  %reads_a_piece = f32[1,1024]{1,0} fusion(%a, %i), kind=kLoop, calls=%slice_in
  %reads_a_piece_within = f32[1,1024]{1,0} fusion(%a, %i), kind=kLoop, calls=%nested
  %writes_a_piece = f32[24,1024]{1,0} fusion(%a, %reads_a_piece, %i), kind=kLoop, calls=%put_in
  %reads_and_writes_all = f32[24,1024]{1,0} fusion(%a), kind=kLoop, calls=%double
  %reads_from_the_chip = f32[24,1024]{1,0} fusion(%near), kind=kLoop, calls=%double
  %bare_slice = f32[1,1024]{1,0} dynamic-slice(%a, %i), dynamic_slice_sizes={1,1024}
  ROOT %bare_sum = f32[24,1024]{1,0} add(%a, %writes_a_piece)
}
"""
ROW, ALL, INDEX = 4 * 1024, 4 * 24 * 1024, 4


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("reads_a_piece", 2 * ROW + INDEX),
        ("reads_a_piece_within", 2 * ROW + INDEX),
        ("writes_a_piece", 2 * ROW + INDEX),
        ("reads_and_writes_all", 2 * ALL),
        ("reads_from_the_chip", ALL),
        ("bare_slice", 2 * ROW),
        ("bare_sum", 3 * ALL),
    ],
)
def test_bytes_of_an_instruction(name, size):
    program = parse_program(FUSED)
    assert memory_bytes(program, program.named["e"][name], "e") == size


def test_memory_on_the_chip_and_numbers_below_a_byte():
    assert type_bytes("(s4[10]{0}, bf16[3,5]{1,0:T(8,128)(2,1)}, f32[7]{0:S(1)})") == 5 + 30
