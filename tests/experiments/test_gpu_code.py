from importlib.util import find_spec

import pytest

from experiments import gpu_code
from experiments.gpu_code import Loop, chunk_loop

NEEDS_GPU_COMPILER = pytest.mark.skipif(
    find_spec("jax_plugins.xla_cuda13") is None if find_spec("jax_plugins") else True,
    reason="needs XLA's compiler for GPUs",
)


def disassembly(*lines):
    return [line if line.endswith(":") else f"        /*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)]


def test_the_loop_around_others_counts_as_one():
    lines = disassembly(
        "MOV R1, R2",
        ".L_x_1:",
        "HGMMA.64x64x16.F32.BF16 R24, R4",
        ".L_x_2:",
        "HGMMA.64x64x16.F32.BF16 R24, R8",
        "BAR.SYNC.DEFER_BLOCKING 0x1, 0x80",
        "@P0 BRA `(.L_x_2)",
        "STL [R1], R0",
        "@P1 BRA `(.L_x_1)",
        ".L_x_3:",
        "HGMMA.64x64x16.F32.BF16 R24, R4",
        "@P1 BRA `(.L_x_3)",
    )
    assert chunk_loop(lines) == Loop(instructions=6, products=2, spill_loads=0, spill_stores=1, barriers=1)


def test_a_wait_that_is_tried_again_is_no_loop():
    lines = disassembly(
        ".L_x_1:",
        "HGMMA.64x64x16.F32.BF16 R24, R4",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R19",
        "BRA `(.L_x_1)",
    )
    assert chunk_loop(lines) is None


@NEEDS_GPU_COMPILER
def test_compiles_the_kernels_of_a_program(tmp_path, capsys):
    assert gpu_code.main(["--shapes", "tiny", "--decays", "token", "--keep", str(tmp_path)]) == 0
    assert "gradients_scalar" in capsys.readouterr().out
    assert list(tmp_path.glob("tiny-token/*.ptx"))


def test_mistakes_are_named(capsys):
    for arguments, named in (
        (["--shapes", "7k"], "got 7k, expected some of 16k"),
        (["--jobs", "0"], "at least 1"),
        (["--cuda", "nowhere"], "no bin/ptxas in nowhere"),
    ):
        with pytest.raises(SystemExit):
            gpu_code.main(arguments)
        assert named in capsys.readouterr().err
