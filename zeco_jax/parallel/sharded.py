"""Linear attention on global arrays: the same operator, owning its shard_map."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from zeco_jax.attention import check_inputs
from zeco_jax.parallel.linear_attention import linear_attention
from zeco_jax.parallel.sharding import MeshAxes, SequenceSharding

OPTIONS = ("scale", "initial_state", "segment_ids", "schedule", "backend", "chunk_size")


def sharded_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    mesh: Mesh,
    batch: MeshAxes = None,
    seq: MeshAxes = "seq",
    heads: MeshAxes = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    r"""Causal linear attention of a sequence that is cut over the devices of a mesh (ZeCO), on global arrays.

    The mathematics and the arguments are those of `linear_attention`; here the arrays are whole, and this function cuts
    them, runs the operator in a `jax.shard_map` of its own and lays the results out the same way. Works with and
    without `jax.jit`, for meshes with Auto and with Explicit axes.

    Args:
        q: [B, T, H, K] floating point.
        k: [B, T, H, K].
        v: [B, T, H, V].
        log_decay: None, [H], [B, T, H] or [B, T, H, K]; natural logarithm, <= 0.
        mesh: the devices.
        batch: mesh axis (or tuple of axes) that cuts B; None leaves it whole.
        seq: mesh axis (or tuple of axes, slowest first) that cuts T.
        heads: mesh axis that cuts H; None leaves it whole.
        **options: `scale`, `initial_state` [B, H, K, V], `segment_ids` [B, T], `schedule`, `backend`, `chunk_size`, as
            in `linear_attention`.

    Returns:
        out: [B, T, H, V] in v's dtype, cut as q is.
        final_state: [B, H, K, V] float32, whole along `seq`.

    Raises:
        ValueError: a dimension that the mesh axes don't divide, an axis that the mesh doesn't have, and whatever
            `linear_attention` refuses.
        TypeError: an unknown option or arguments of the wrong type.

    Reference: ZeCO, arXiv 2507.01004, section 3.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import zeco_jax
        >>> mesh = jax.make_mesh((4,), ("seq",), devices=jax.devices()[:4])
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> out, final_state = zeco_jax.sharded_linear_attention(x, x, x, mesh=mesh, scale=1.0)
        >>> out[0, :, 0, 0].tolist()
        [4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0, 32.0]
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}: expected one of {', '.join(OPTIONS)}")
    initial_state = options.pop("initial_state", None)
    segment_ids = options.pop("segment_ids", None)
    check_inputs(
        q,
        k,
        v,
        log_decay,
        scale=options.get("scale"),
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=options.get("chunk_size"),
    )
    sharding = SequenceSharding(mesh, batch, seq, heads)
    check_cuts(sharding, "q", q, "BTH")
    activations = PartitionSpec(batch, seq, heads)
    state = PartitionSpec(batch, heads)
    gates = PartitionSpec(heads) if log_decay is not None and log_decay.ndim == 1 else activations
    specs = {
        "q": activations,
        "k": activations,
        "v": activations,
        "log_decay": gates,
        "initial_state": state,
        "segment_ids": sharding.spec(2),
    }
    arrays = dict(zip(specs, (q, k, v, log_decay, initial_state, segment_ids), strict=True))
    operator = partial(linear_attention, axis_name=seq, **options)
    return run_cut(operator, arrays, specs, (activations, state), sharding)


def check_cuts(sharding: SequenceSharding, name: str, array: jax.Array, letters: str) -> None:
    """Raises ValueError if the ranks don't divide the first three dimensions of an array, whose letters these are."""
    cuts = {field: getattr(sharding, field) for field in ("batch", "seq", "heads")}
    for letter, length, (field, axes) in zip(letters, array.shape[:3], cuts.items(), strict=True):
        ranks = sharding.size(axes)
        if length % ranks:
            raise ValueError(
                f"{name} has {letter} = {length}, which the {ranks} ranks of {field}={axes!r} don't divide"
            )


def run_cut(
    operator: Callable[..., Any],
    arrays: dict[str, jax.Array | None],
    specs: dict[str, PartitionSpec],
    out_specs: Any,
    sharding: SequenceSharding,
) -> Any:
    """Lays whole arrays out by `specs`, runs the operator on every rank's pieces, its results lie by `out_specs`.

    Arrays that are None are left out.
    """
    given = {name: sharding.place(x, specs[name]) for name, x in arrays.items() if x is not None}
    in_specs = ({name: specs[name] for name in given},)
    body = jax.shard_map(lambda pieces: operator(**pieces), mesh=sharding.mesh, in_specs=in_specs, out_specs=out_specs)
    return body(given)
