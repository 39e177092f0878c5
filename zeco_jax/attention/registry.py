"""Backends by name, and which one serves a call that names none."""

from zeco_jax.attention.backend import Backend
from zeco_jax.attention.reference import ReferenceBackend
from zeco_jax.attention.xla import XlaBackend

# Best first: the order in which a call that names no backend tries them.
BACKENDS: dict[str, type[Backend]] = {"xla": XlaBackend, "reference": ReferenceBackend}


def make_backend(name: str | None = None, *, scale: float = 1.0, chunk_size: int | None = None) -> Backend:
    """The backend called `name`, or the best one that can serve for None.

    Raises:
        ValueError: if there is no backend of that name.
    """
    if name is None:
        name = next(iter(BACKENDS))
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected None or one of {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[name](scale=scale, chunk_size=chunk_size)
