"""What a compiled program does on a pod: the bytes that it puts on the wire, and what it does while they travel."""

from zeco_jax.pods.hlo import Collective, collectives_in, permuted_bytes
from zeco_jax.pods.schedule import Overlap, Work, overlaps_in

__all__ = ["Collective", "Overlap", "Work", "collectives_in", "overlaps_in", "permuted_bytes"]
