"""The short causal convolution that stands before linear attention, right across ranks and documents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from zeco_jax.collectives import AxisName, axis_index, axis_size, halo
from zeco_jax.layers.checks import check_one_way
from zeco_jax.layers.initializers import default_filter_init
from zeco_jax.layers.placement import divides
from zeco_jax.parallel import SequenceSharding

Dtype = jax.typing.DTypeLike


def causal_convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    history: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    """Convolves every channel with its own causal filter.

    `y[t] = sum_w kernel[w] * x[t - (W - 1) + w]`, where a token of another document, or before the first token, counts
    as zero. Sums are taken in float32.

    Args:
        x: [B, T, D] floats; inside `jax.shard_map` the rank's own tokens.
        kernel: [W, D] floats; `kernel[W - 1]` weighs the token itself.
        segment_ids: [B, T] integers; a change of id is a border that the filter doesn't reach across.
        history: [B, W - 1, D] the tokens before the first one, of the first one's document; zeros if not given.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) along which T is sharded.

    Returns:
        [B, T, D] in the dtype of `x`.

    Example:
        >>> import jax.numpy as jnp
        >>> from zeco_jax.layers import causal_convolution
        >>> x = jnp.arange(1.0, 5.0).reshape(1, 4, 1)
        >>> causal_convolution(x, jnp.array([[10.0], [1.0]]))[0, :, 0].tolist()
        [1.0, 12.0, 23.0, 34.0]
    """
    reach = kernel.shape[0] - 1
    tokens = x.shape[1]
    extended = jnp.concatenate([preceding(x, reach, history, axis_name), x], axis=1).astype(jnp.float32)
    together = _unbroken_runs(segment_ids, reach, axis_name)
    total = 0.0
    for distance in range(reach + 1):
        shifted = jax.lax.slice_in_dim(extended, reach - distance, reach - distance + tokens, axis=1)
        if together and distance:
            shifted = jnp.where(together[distance - 1][..., None], shifted, 0.0)
        total = total + shifted * kernel[reach - distance].astype(jnp.float32)
    return total.astype(x.dtype)


def preceding(
    x: jax.Array, width: int, history: jax.Array | None = None, axis_name: AxisName | None = None
) -> jax.Array:
    """The `width` tokens before `x` [B, T, ...]: the left neighbours', and `history` where those end."""
    if axis_name is None:
        return jnp.zeros_like(x, shape=(x.shape[0], width, *x.shape[2:])) if history is None else history
    neighbours = halo(x, width, axis_name)
    if history is None:
        return neighbours
    # The halo of rank r starts at token r * T - width: what lies before token 0 comes from the history.
    padded = jnp.concatenate([history, jnp.zeros_like(history)], axis=1)
    start = jnp.minimum(axis_index(axis_name) * x.shape[1], width)
    return neighbours + jax.lax.dynamic_slice_in_dim(padded, start, width, axis=1).astype(x.dtype)


def following_history(
    x: jax.Array, history: jax.Array, segment_ids: jax.Array | None = None, axis_name: AxisName | None = None
) -> jax.Array:
    """The last tokens of `history` and `x` together, on every rank: the history of the next stretch.

    Only tokens of the last one's document are kept; the others are zero.
    """
    width = history.shape[1]
    seen = jnp.concatenate([preceding(x, width, history, axis_name), x], axis=1)
    last = jax.lax.slice_in_dim(seen, seen.shape[1] - width, seen.shape[1], axis=1)
    if segment_ids is not None and width > 1:
        runs = [run[:, -1] for run in _unbroken_runs(segment_ids, width - 1, axis_name)]
        last = jnp.where(jnp.stack([*runs[::-1], jnp.ones_like(runs[0])], axis=1)[..., None], last, 0)
    if axis_name is None:
        return last
    is_last_rank = axis_index(axis_name) == axis_size(axis_name) - 1
    return jax.lax.psum(jnp.where(is_last_rank, last, jnp.zeros_like(last)), axis_name)


def _unbroken_runs(segment_ids: jax.Array | None, reach: int, axis_name: AxisName | None) -> list[jax.Array]:
    """For distances 1..reach: whether no border lies between a token and the one that far before it, [B, T] each."""
    if segment_ids is None or reach <= 0:
        return []
    tokens = segment_ids.shape[1]
    ids = jnp.concatenate([preceding(segment_ids, reach + 1, axis_name=axis_name), segment_ids], axis=1)
    first = 0 if axis_name is None else axis_index(axis_name) * tokens
    # What lies before the sequence counts to its first document: it is that document's history, or zero.
    before = jnp.arange(-reach, tokens) + first <= 0
    same = (ids[:, 1:] == ids[:, :-1]) | before  # same[:, reach + t]: tokens t - 1 and t
    runs = [same[:, reach : reach + tokens]]
    for distance in range(1, reach):
        runs.append(runs[-1] & same[:, reach - distance : reach - distance + tokens])
    return runs


class ShortConvolution(nnx.Module):
    """Depthwise causal convolution over a few tokens, followed by SiLU.

    It works on one device, on global arrays (`sharding`; it then owns a `jax.shard_map`), and inside the caller's own
    `jax.shard_map` (`axis_name`). Between ranks only the last `width - 1` tokens of the left neighbour travel.

    Args:
        features: number of channels D.
        width: number of taps W, the token itself included; at least 1.
        activation: function applied to the result, or None.
        sharding: how global [B, T, D] arrays lie on a mesh.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) along which T is sharded.
        dtype: compute dtype of the result; that of the input if not given.
        kernel_init: initialiser of the [W, D] filter.
        rngs: random streams; `params` is used.

    Raises:
        ValueError: `width` is below 1, or `sharding` and `axis_name` are both given.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from zeco_jax.layers import ShortConvolution
        >>> layer = ShortConvolution(8, 4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 5, 8))).shape
        (2, 5, 8)
    """

    def __init__(
        self,
        features: int,
        width: int,
        *,
        activation: Callable[[jax.Array], jax.Array] | None = nnx.silu,
        sharding: SequenceSharding | None = None,
        axis_name: AxisName | None = None,
        dtype: Dtype | None = None,
        kernel_init: nnx.Initializer = default_filter_init,
        rngs: nnx.Rngs,
    ) -> None:
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        check_one_way(sharding, axis_name)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, features), jnp.float32))
        self.features = features
        self.width = width
        self.activation = activation
        self.sharding = sharding
        self.axis_name = axis_name
        self.dtype = dtype

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Convolves a whole sequence.

        Args:
            x: [B, T, D] floats.
            segment_ids: [B, T] integers; the filter doesn't reach across a change of id.

        Returns:
            [B, T, D].
        """
        return self._run(x, segment_ids, None, self.sharding)[0]

    def init_cache(self, batch_size: int) -> jax.Array:
        """The history of a sequence that hasn't begun: zeros [B, W - 1, D]."""
        return jnp.zeros((batch_size, self.width - 1, self.features), self.dtype or jnp.float32)

    def prefill(
        self, x: jax.Array, history: jax.Array, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Convolves the next stretch of a sequence.

        Args:
            x: [B, T, D] the next T tokens; T may be 1. A stretch that `sharding` can't divide runs whole on every
                device.
            history: [B, W - 1, D] the tokens before it, from `init_cache` or the last call; zero where the stretch
                begins a document.
            segment_ids: [B, T] integers; the filter doesn't reach across a change of id.

        Returns:
            The result [B, T, D], and the history of the next stretch: the last tokens of the last document.
        """
        return self._run(x, segment_ids, history, self.sharding if divides(self.sharding, x) else None)

    def _run(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None,
        history: jax.Array | None,
        sharding: SequenceSharding | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        x = x if self.dtype is None else x.astype(self.dtype)
        axis_name = self.axis_name if sharding is None else sharding.seq

        def convolve(
            kernel: jax.Array, x: jax.Array, segment_ids: jax.Array | None, history: jax.Array | None
        ) -> tuple[jax.Array, jax.Array | None]:
            y = causal_convolution(x, kernel, segment_ids=segment_ids, history=history, axis_name=axis_name)
            if history is not None:
                history = following_history(x, history, segment_ids, axis_name).astype(history.dtype)
            return y if self.activation is None else self.activation(y), history

        arguments = (self.kernel[...], x, segment_ids, history)
        if sharding is None:
            return convolve(*arguments)
        by_batch = PartitionSpec(sharding.batch)
        specs = (PartitionSpec(), sharding.spec(3), sharding.spec(2), by_batch)
        placed = [None if x is None else sharding.place(x, spec) for x, spec in zip(arguments, specs, strict=True)]
        out_specs = (sharding.spec(3), by_batch)
        return jax.shard_map(convolve, mesh=sharding.mesh, in_specs=specs, out_specs=out_specs)(*placed)
