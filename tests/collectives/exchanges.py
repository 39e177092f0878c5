"""All-Scans over any mesh as functions of whole arrays, and their inputs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import zeco_jax
from tests.meshes import mesh
from zeco_jax.collectives.cost import Payload

FLAT = ("chain", "serial", "doubling", "gather", "transpose")
MESHES = ((2, 2, 2), (2, 4), (3, 2))

HEADS, KEYS, VALUES = 2, 3, 5
PAYLOAD = Payload(HEADS * KEYS, VALUES)


def mesh_id(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def make(ranks: int, decay: str = "channel", seed: int = 0):
    """Arrays of every rank (state, decay), the initial state, which all share, and a cotangent."""
    rng = np.random.default_rng(seed)
    shape = (ranks, HEADS, KEYS, VALUES)
    return {
        "state": rng.normal(size=shape).astype(np.float32),
        "decay": rng.uniform(size=shape[:3] if decay == "channel" else shape[:2]).astype(np.float32),
        "initial_state": rng.normal(size=shape[1:]).astype(np.float32),
    }, rng.normal(size=shape).astype(np.float32)


def all_scan_over(sizes: tuple[int, ...], *, check_vma: bool = True, **options):
    """all_scan over a mesh of these sizes, slowest axis first, as a function of what `make` makes."""
    names = tuple(f"axis{level}" for level in range(len(sizes)))
    spec = PartitionSpec(names)

    def run(state, decay, initial_state=None):
        shared = PartitionSpec() if initial_state is None else spec
        if initial_state is not None:
            initial_state = jnp.broadcast_to(initial_state, state.shape)

        def local(state, decay, initial_state):
            first = None if initial_state is None else initial_state[0]
            axes = names if len(names) > 1 else names[0]
            return zeco_jax.all_scan(state[0], decay[0], axes, initial_state=first, **options)[None]

        return jax.shard_map(
            local,
            mesh=mesh(**dict(zip(names, sizes, strict=True))),
            in_specs=(spec, spec, shared),
            out_specs=spec,
            check_vma=check_vma,
        )(state, decay, initial_state)

    return run


def compiled_text(sizes: tuple[int, ...], **options) -> str:
    """The program of one All-Scan without an initial state."""
    arrays, _ = make(math.prod(sizes))
    return jax.jit(all_scan_over(sizes, **options)).lower(arrays["state"], arrays["decay"]).compile().as_text()
