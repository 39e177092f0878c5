"""Backend of Pallas Mosaic GPU kernels for Hopper GPUs (H100, H200)."""

from zeco_jax.attention.hopper.backend import HopperBackend

__all__ = ["HopperBackend"]
