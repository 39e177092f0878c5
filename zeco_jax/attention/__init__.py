"""One device: linear attention as summaries and replays, its backends and its gradient. Knows nothing of a mesh."""

from zeco_jax.attention.backend import Backend, Call, Gradients, Summary, total_decay
from zeco_jax.attention.checks import check_inputs
from zeco_jax.attention.gates import LOG_ZERO, accumulation_dtype, document_starts, normalize_gates
from zeco_jax.attention.hopper import HopperBackend
from zeco_jax.attention.operator import Exchange, attend
from zeco_jax.attention.reference import ReferenceBackend, recurrence
from zeco_jax.attention.registry import BACKENDS, make_backend
from zeco_jax.attention.tpu import TpuBackend
from zeco_jax.attention.xla import XlaBackend

__all__ = [
    "BACKENDS",
    "LOG_ZERO",
    "Backend",
    "Call",
    "Exchange",
    "Gradients",
    "HopperBackend",
    "ReferenceBackend",
    "Summary",
    "TpuBackend",
    "XlaBackend",
    "accumulation_dtype",
    "attend",
    "check_inputs",
    "document_starts",
    "make_backend",
    "normalize_gates",
    "recurrence",
    "total_decay",
]
