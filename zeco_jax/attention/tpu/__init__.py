"""The chunkwise backend in Pallas kernels for TPUs."""

from zeco_jax.attention.tpu.backend import TpuBackend
from zeco_jax.attention.tpu.generations import generation_of
from zeco_jax.attention.tpu.tiling import Tiling, choose_tiling
from zeco_jax.attention.tpu.work import KERNELS, Work

__all__ = ["KERNELS", "Tiling", "TpuBackend", "Work", "choose_tiling", "generation_of"]
