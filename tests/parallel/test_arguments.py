"""Mistakes that only a mesh makes possible."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import zeco_jax
from tests.arguments import wrong
from tests.meshes import mesh
from zeco_jax.parallel import SequenceSharding

ARGUMENTS = {
    "q": np.zeros((2, 8, 2, 4), np.float32),
    "k": np.zeros((2, 8, 2, 4), np.float32),
    "v": np.zeros((2, 8, 2, 5), np.float32),
    "log_decay": np.zeros((2, 8, 2), np.float32),
}


def attend(**changed):
    options = {"mesh": mesh(data=2, seq=4), "batch": "data", **ARGUMENTS, **changed}
    return zeco_jax.sharded_linear_attention(**options)


@pytest.mark.parametrize(
    "mistake",
    [
        wrong("q", np.zeros((2, 8, 2), np.float32)),
        wrong("k", np.zeros((2, 8, 2, 3), np.float32)),
        wrong("v", np.zeros((2, 7, 2, 5), np.float32)),
        wrong("q", np.zeros((2, 8, 2, 4), np.int32)),
        wrong("log_decay", np.zeros((2, 8), np.float32)),
        wrong("segment_ids", np.zeros((2, 7), np.int32)),
        wrong("segment_ids", np.zeros((2, 8), np.float32)),
        wrong("initial_state", np.zeros((2, 2, 5, 4), np.float32)),
        wrong("batch", "nowhere", names="batch|mesh"),
        wrong("seq", "nowhere", names="seq|mesh"),
        wrong("heads", "nowhere", names="heads|mesh"),
        wrong("heads", "data", names="heads|batch"),
        wrong("seq", 1, names="seq|mesh"),
        wrong("mesh", None),
        wrong("mesh", "seq"),
        wrong("schedule", "teleport"),
        wrong("backend", "cuda"),
        wrong("chunk_size", 0),
        wrong("axis_name", "seq"),
        wrong("colour", "blue"),
    ],
)
def test_mistake_is_named(mistake):
    with pytest.raises((ValueError, TypeError), match=mistake.pattern) as caught:
        attend(**{mistake.argument: mistake.value})
    mistake.check(caught.value)


@pytest.mark.parametrize(
    ("dimension", "shape", "cuts"),
    [
        ("T", (2, 6, 2, 4), {}),
        ("B", (3, 8, 2, 4), {}),
        ("H", (2, 8, 3, 4), {"batch": None, "heads": "data"}),
    ],
)
def test_what_the_ranks_do_not_divide_is_named(dimension, shape, cuts):
    x = np.zeros(shape, np.float32)
    size = shape["BTH".index(dimension)]
    with pytest.raises(ValueError, match=rf"(?s)\b{dimension}\b.*\b{size}\b"):
        attend(q=x, k=x, v=x, log_decay=None, **cuts)


@pytest.mark.parametrize("axis_name", ["nowhere", "data", ("seq", "nowhere")])
def test_axis_not_in_scope(axis_name):
    def local(q, k, v):
        return zeco_jax.linear_attention(q, k, v, axis_name=axis_name)[0]

    spec = PartitionSpec(None, "seq")
    with pytest.raises(ValueError, match=r"\baxis_name\b"):
        jax.shard_map(local, mesh=mesh(seq=4), in_specs=spec, out_specs=spec)(
            ARGUMENTS["q"], ARGUMENTS["k"], ARGUMENTS["v"]
        )


@pytest.mark.parametrize("cuts", [{"batch": "nowhere"}, {"seq": "nowhere"}, {"heads": "data", "batch": "data"}])
def test_sequence_sharding_names_a_bad_axis(cuts):
    with pytest.raises(ValueError, match=r"nowhere|data"):
        SequenceSharding(mesh(data=2, seq=4), **cuts)
