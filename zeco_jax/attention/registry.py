"""Backends by name, and which one serves a call that names none."""

import logging

from zeco_jax.attention.backend import Backend, Call
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

_log = logging.getLogger(__name__)


def make_backend(name: str | None, call: Call, *, scale: float = 1.0, chunk_size: int | None = None) -> Backend:
    """The backend called `name`, or the best one that can serve the call for None.

    Why a better one was passed over is logged, at level INFO.

    Raises:
        ValueError: if there is no backend of that name.
        NotImplementedError: if the backend of that name can't serve the call; its message says why.
        ExceptionGroup: if none can, of each one's reason.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected None or one of {', '.join(map(repr, BACKENDS))}")
    reasons = []
    for candidate in BACKENDS if name is None else [name]:
        backend = BACKENDS[candidate](scale=scale, chunk_size=chunk_size)
        try:
            backend.check(call)
        except NotImplementedError as reason:
            reason = NotImplementedError(f"backend {candidate!r} can't serve this call: {reason}")
            if name is not None:
                raise reason from None
            _log.info("%s", reason)
            reasons.append(reason)
        else:
            return backend
    raise ExceptionGroup("no backend can serve this call", reasons)
