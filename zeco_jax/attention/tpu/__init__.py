"""The chunkwise backend in Pallas kernels for TPUs."""

from zeco_jax.attention.tpu.backend import TpuBackend

__all__ = ["TpuBackend"]
