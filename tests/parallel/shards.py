"""Operators of one rank's shard, as functions of whole arrays."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import PartitionSpec

from tests.meshes import mesh

TOKENS = PartitionSpec(None, "seq")
REPLICATED = PartitionSpec()


def over_ranks(operator: Callable, ranks: int, *, check_vma: bool = True, **options) -> Callable:
    """`operator` inside a shard_map over `ranks`, with `axis_name` and `options`, as a function of whole arrays."""

    def attend(q, k, v, log_decay=None, *, initial_state=None, segment_ids=None, **call_options):
        arrays = {
            "q": q, "k": k, "v": v, "log_decay": log_decay,
            "initial_state": initial_state, "segment_ids": segment_ids,
        }  # fmt: skip
        arrays = {name: array for name, array in arrays.items() if array is not None}
        specs = {name: TOKENS for name in arrays} | {"initial_state": REPLICATED}
        if log_decay is not None and log_decay.ndim == 1:
            specs["log_decay"] = REPLICATED
        local = partial(operator, axis_name="seq", **options, **call_options)
        return jax.shard_map(
            lambda arrays: local(**arrays),
            mesh=mesh(seq=ranks),
            in_specs=({name: specs[name] for name in arrays},),
            out_specs=(TOKENS, REPLICATED),
            check_vma=check_vma,
        )(arrays)

    return attend
