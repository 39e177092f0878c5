"""The chunkwise backend in plain XLA."""

from zeco_jax.attention.xla.backend import XlaBackend

__all__ = ["XlaBackend"]
