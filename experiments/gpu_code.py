"""Machine code of the Hopper kernels, compiled without a GPU: `python -m experiments.gpu_code`.

    python -m experiments.gpu_code                                        every named shape, both kinds of decay
    python -m experiments.gpu_code --shapes 16k --decays channel --keep sass   one program, and the disassembly to read

Compiles forward and backward pass for an H100 that isn't there, and reads what the assembler and the disassembler say
of each kernel: registers that it spilled, and the instructions of its loop over chunks, as a warp meets them. With 8
warps at work on a multiprocessor, these decide the time of kernels that don't wait for memory. The loop is the first
that multiplies matrices: where strong chunks have code of their own, that of weak ones.

Needs XLA's compiler for GPUs (pip install 'jax[cuda13]'), ptxas, which comes with it, and for the loops nvdisasm
(pip install nvidia-cuda-nvdisasm). Another CUDA (--cuda) makes other code. Nothing has run on a GPU.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from experiments.command_line import run_program
from experiments.kernel_cases import SHAPES, Case, Decay
from experiments.kernel_programs import Contender, dtype_of, function
from zeco_jax.attention import attend
from zeco_jax.attention.hopper import HopperBackend

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84978434048
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA must know of a GPU to compile for it."""
# A wait for a barrier is tried again out of line: what jumps back from there is no loop.
_TRIED_AGAIN, _AGAIN_WITHIN = "PHASECHK", 8
_LABEL, _INSTRUCTION = re.compile(r"\s*(\.L_\w+):"), re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_JUMP = re.compile(r"\bBRA\b.*?`\((\.L_\w+)\)")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class CodeConfig:
    """What is compiled, and what is kept of it."""

    shapes: tuple[str, ...] = tuple(name for name in SHAPES if not name.startswith("tiny"))
    """Names of shapes, as in experiments.kernels."""
    decays: tuple[Decay, ...] = ("channel", "token")
    """Gates per key channel, or per token and head."""
    jobs: int = 2
    """Compilations at a time."""
    keep: Path | None = None
    """Folder for the kernels' PTX and disassembly, in one folder a case; None: they are thrown away."""
    cuda: Path | None = None
    """Folder of the CUDA whose ptxas assembles; None: the one that comes with JAX, or is on the path."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.shapes if name not in SHAPES]
        if unknown or not self.shapes:
            raise ValueError(f"shapes: got {', '.join(unknown) or 'none'}, expected some of {', '.join(SHAPES)}")
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")
        if self.cuda and not (self.cuda / "bin" / "ptxas").exists():
            raise ValueError(f"cuda: there is no bin/ptxas in {self.cuda}")


class Loop(NamedTuple):
    """Instructions of a loop's body: all, products of matrices, loads and stores of spilled registers, barriers."""

    instructions: int
    products: int
    spill_loads: int
    spill_stores: int
    barriers: int


class Code(NamedTuple):
    """One kernel.

    Attributes:
        name: of the kernel.
        spill_stores: bytes, in all of the kernel.
        spill_loads: bytes.
        loop: over chunks; None without a disassembler, or without such a loop.
    """

    name: str
    spill_stores: int
    spill_loads: int
    loop: Loop | None


def chunk_loop(lines: Iterable[str]) -> Loop | None:
    """The first loop with products of matrices, of a kernel's disassembly, with the loops that are in it.

    Example:
        >>> from experiments.gpu_code import chunk_loop
        >>> chunk_loop(["/*0000*/ MOV R1, R2 ;", ".L_x_1:", "/*0010*/ HGMMA.64x64x16.F32.BF16 R24, R4 ;",
        ...             "/*0020*/ LDL R0, [R1] ;", "/*0030*/ @P0 BRA `(.L_x_1) ;"])
        Loop(instructions=3, products=1, spill_loads=1, spill_stores=0, barriers=0)
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(found[1])
    loops = []
    for last, instruction in enumerate(code):
        jump = _JUMP.search(instruction)
        first = labels.get(jump[1], last + 1) if jump else last + 1
        tried_again = any(_TRIED_AGAIN in before for before in code[max(last - _AGAIN_WITHIN, 0) : last])
        if first <= last and not tried_again and any("HGMMA" in inside for inside in code[first : last + 1]):
            loops.append((first, last))
    if not loops:
        return None
    # Of those that begin together the longest is the one around the others.
    first = min(loops)[0]
    body = code[first : max(last for begin, last in loops if begin == first) + 1]
    return Loop(len(body), *(sum(word in words for words in body) for word in ("HGMMA", "LDL", "STL", "BAR.SYNC")))


def tool(name: str, cuda: Path | None = None) -> str | None:
    """Where a program of CUDA's is: in a given CUDA, among Python's packages, or on the path."""
    package = find_spec("nvidia")
    roots = [Path(folder, "cu13") for folder in package.submodule_search_locations] if package else []
    if cuda:
        roots.insert(0, cuda)
    return shutil.which(name, path=os.pathsep.join(str(root / "bin") for root in roots)) or shutil.which(name)


def ptxas_release(cuda: Path | None) -> str:
    """Of the assembler: another makes other code."""
    said = subprocess.run([tool("ptxas", cuda), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]


def kernels_of(case: Case, folder: str, cuda: Path | None = None) -> list[Code]:
    """Compiles the gradients of a case in this process, which must not have started JAX before.

    Args:
        case: shape and decay.
        folder: an empty one for PTX and disassembly.
        cuda: as in `CodeConfig`.
    """
    os.environ.update(MOSAIC_GPU_DUMP_TO=folder, MOSAIC_GPU_DUMP_PTX="1")
    jax.config.update("jax_platforms", "cpu")
    # The topology's name is asked for, and means nothing.
    slice_ = topologies.get_topology_desc("one", "cuda", topology="1x1x1", target_config=H100)
    sharding = NamedSharding(Mesh(slice_.devices, ("devices",)), PartitionSpec())
    backend = HopperBackend(case.shape.key_width**-0.5)
    program = function(Contender("hopper", case, lambda arrays: attend(**arrays, backend=backend)[0]), "gradient")
    arrays = {name: jax.ShapeDtypeStruct(shape, dtype_of(name)) for name, shape in case.array_shapes.items()}
    cotangent = jax.ShapeDtypeStruct(case.array_shapes["v"], jnp.bfloat16)
    traced = jax.jit(program, in_shardings=sharding, out_shardings=sharding).trace(arrays, cotangent)
    traced.lower(lowering_platforms=("cuda",)).compile()
    for other in Path(folder).iterdir():
        if other.suffix != ".ptx":
            other.unlink()
    return [assemble(path, cuda) for path in sorted(Path(folder).glob("*.ptx"), key=_place)]


def _place(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def assemble(path: Path, cuda: Path | None) -> Code:
    """What assembler and disassembler say of a kernel's PTX; the disassembly goes beside it."""
    binary, code = path.with_suffix(".cubin"), path.with_suffix(".sass")
    said = subprocess.run(
        [tool("ptxas", cuda), "--gpu-name=sm_90a", "--verbose", path, "--output-file", binary],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    stores, loads = map(int, _SPILLED.findall(said.stderr)[-1])
    loop = None
    if disassembler := tool("nvdisasm", cuda):
        code.write_text(subprocess.run([disassembler, "-c", binary], capture_output=True, text=True, check=True).stdout)
        loop = chunk_loop(code.read_text().splitlines())
    binary.unlink()
    return Code(path.stem.rpartition("_")[0], stores, loads, loop)


def compile_all(config: CodeConfig, folder: Path, console: Console) -> dict[Case, list[Code]]:
    """Each case in a process of its own: where to dump to is read once.

    Raises:
        ModuleNotFoundError: the compiler or the assembler is missing.
    """
    if find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None:
        raise ModuleNotFoundError("XLA's compiler for GPUs is missing: pip install 'jax[cuda13]'")
    if tool("ptxas", config.cuda) is None:
        raise ModuleNotFoundError("ptxas is missing: it comes with jax[cuda13] and with CUDA")
    cases = [Case(name, SHAPES[name], decay) for name in config.shapes for decay in config.decays]
    with (
        ProcessPoolExecutor(config.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool,
        console.status("compiling"),
    ):
        waiting = {}
        for case in cases:
            own = folder / f"{case.name}-{case.decay}"
            own.mkdir()
            waiting[case] = pool.submit(kernels_of, case, str(own), config.cuda)
        return {case: future.result() for case, future in waiting.items()}


def table(found: dict[Case, list[Code]], release: str) -> Table:
    """A row for each kernel, in the order in which the program names them."""
    made = Table(title=f"kernels compiled for an H100 (ptxas {release}), not run: spilled bytes; the loop over chunks")
    for heading in ("case", "kernel"):
        made.add_column(heading)
    for heading in ("stores", "loads", "instructions", "products", "spill loads", "spill stores", "barriers"):
        made.add_column(heading, justify="right")
    for case, kernels in found.items():
        for number, kernel in enumerate(kernels):
            made.add_row(
                case.label if number == 0 else "",
                kernel.name,
                str(kernel.spill_stores),
                str(kernel.spill_loads),
                *map(str, kernel.loop or [""] * len(Loop._fields)),
                end_section=number == len(kernels) - 1,
            )
    return made


def report(config: CodeConfig) -> None:
    """Compiles and prints the table."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory() as temporary:
        console.print(table(compile_all(config, Path(temporary), console), ptxas_release(config.cuda)))
        if config.keep:
            shutil.copytree(temporary, config.keep, dirs_exist_ok=True)
            console.print(f"PTX and disassembly are in {config.keep}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the machine code of the Hopper kernels; see `run_program`."""
    return run_program("gpu_code", CodeConfig, report, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
