"""What a compiled program does on a pod: the bytes that it puts on the wire."""

from zeco_jax.pods.hlo import Collective, collectives_in, permuted_bytes

__all__ = ["Collective", "collectives_in", "permuted_bytes"]
