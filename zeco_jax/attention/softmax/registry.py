"""Softmax backends by name, and which one serves a call that names none."""

import jax

from zeco_jax.attention.choice import first_that_serves
from zeco_jax.attention.softmax.backend import SoftmaxBackend
from zeco_jax.attention.softmax.cudnn import CudnnSoftmaxBackend
from zeco_jax.attention.softmax.xla import XlaSoftmaxBackend

# Best first: the order in which a call that names no backend tries them. JAX ships kernels for TPUs too, but their
# outputs don't say over which mesh axes they vary, so that `jax.shard_map` refuses them unless its check is off (0.12).
SOFTMAX_BACKENDS: dict[str, type[SoftmaxBackend]] = {"cudnn": CudnnSoftmaxBackend, "xla": XlaSoftmaxBackend}


def make_softmax_backend(name: str | None, q: jax.Array, k: jax.Array, v: jax.Array) -> SoftmaxBackend:
    """The softmax backend called `name`, or the best one that can serve these arrays for None.

    Why a better one was passed over is logged, at level INFO.

    Raises:
        ValueError: if there is no backend of that name.
        NotImplementedError: if the backend of that name can't serve the call; its message says why.
        ExceptionGroup: if none can, of each one's reason.
    """
    return first_that_serves(name, SOFTMAX_BACKENDS, lambda backend: backend.check(q, k, v))
