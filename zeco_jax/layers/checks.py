"""What the layers refuse: errors that name the argument."""

import jax

from zeco_jax.collectives import AxisName
from zeco_jax.parallel import SequenceSharding


def check_rank(name: str, x: jax.Array, rank: int) -> None:
    """Refuses an array whose number of dimensions isn't `rank`."""
    if x.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {x.shape}")


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Refuses key heads that query heads can't share evenly."""
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")


def check_one_way(sharding: SequenceSharding | None, axis_name: AxisName | None) -> None:
    """Refuses two ways at once to say that tokens are sharded."""
    if sharding is not None and axis_name is not None:
        raise ValueError("give sharding (global arrays) or axis_name (inside jax.shard_map), not both")
