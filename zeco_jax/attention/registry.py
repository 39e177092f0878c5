"""Backends by name, and which one serves a call that names none."""

from functools import partial

from zeco_jax.attention.backend import Backend, Call
from zeco_jax.attention.choice import first_that_serves
from zeco_jax.attention.hopper import HopperBackend
from zeco_jax.attention.reference import ReferenceBackend
from zeco_jax.attention.tpu import TpuBackend
from zeco_jax.attention.xla import XlaBackend

# Best first: the order in which a call that names no backend tries them.
BACKENDS: dict[str, type[Backend]] = {
    "tpu": TpuBackend,
    "hopper": HopperBackend,
    "xla": XlaBackend,
    "reference": ReferenceBackend,
}


def make_backend(name: str | None, call: Call, *, scale: float = 1.0, chunk_size: int | None = None) -> Backend:
    """The backend called `name`, or the best one that can serve the call for None.

    Why a better one was passed over is logged, at level INFO.

    Raises:
        ValueError: if there is no backend of that name.
        NotImplementedError: if the backend of that name can't serve the call; its message says why.
        ExceptionGroup: if none can, of each one's reason.
    """
    makers = {key: partial(kind, scale=scale, chunk_size=chunk_size) for key, kind in BACKENDS.items()}
    return first_that_serves(name, makers, lambda backend: backend.check(call))
