"""A sequence in chunks, on one device or cut over ranks, has the loss and the gradients of the whole sequence."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.layers.shared import assert_trees_agree
from tests.training.runs import small_run
from zeco_jax.pods import overlaps_in
from zeco_jax.training import (
    Batch,
    MeshConfig,
    TrainConfig,
    compile_program,
    make_mesh,
    make_objective,
    place,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    """Two layers with a short convolution, whole sequences on one device."""
    run = small_run(tmp_path_factory.mktemp("objective"), mesh=MeshConfig())
    return dataclasses.replace(run, architecture=dataclasses.replace(run.architecture, num_layers=2))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Packed documents that begin inside chunks and ranks and with them, some of one token; an id that comes back."""
    ids = np.stack([np.repeat([0, 1, 2, 3, 2, 5], [16, 6, 1, 1, 24, 16]), np.repeat([0, 1, 2, 3], [5, 33, 10, 16])])
    tokens = np.random.default_rng(0).integers(256, size=(2, 2, 64))
    mask = np.diff(ids, append=-1) == 0
    return Batch(*(part.astype(np.int32) for part in (*tokens, ids)), mask)


@pytest.fixture(scope="module")
def parameters(config):
    """Far from those at the start, where gates forget little and projections give little."""
    drawn = compile_program(config, make_mesh(config.mesh)).create().parameters
    seeds = jax.random.split(jax.random.key(1), len(drawn))
    return {
        name: leaf + 0.05 * jax.random.normal(seed, leaf.shape)
        for seed, (name, leaf) in zip(seeds, sorted(drawn.items()), strict=True)
    }


def loss_and_gradients(config: TrainConfig, parameters, batch: Batch):
    """And the compiled program's text."""
    mesh = make_mesh(config.mesh)
    objective = make_objective(config, mesh)
    placed = place(batch, mesh, config.chunk_tokens)
    parameters = jax.device_put(parameters, jax.NamedSharding(mesh, jax.P()))
    compiled = (
        jax.jit(jax.value_and_grad(lambda parameters, batch: objective(parameters, batch).mean))
        .lower(parameters, placed)
        .compile()
    )
    return jax.device_get(compiled(parameters, placed)), compiled.as_text()


@pytest.fixture(scope="module")
def whole(config, parameters, batch):
    return loss_and_gradients(config, parameters, batch)[0]


@pytest.mark.parametrize(
    ("data", "seq", "changes"),
    [(1, 1, {}), (1, 8, {"remat": True}), (2, 4, {"mlp_block_tokens": 3, "loss_block_tokens": 5})],
    ids=["1x1", "1x8-remat", "2x4-blocks"],
)
def test_chunks_equal_the_whole(config, parameters, batch, whole, data, seq, changes):
    run = dataclasses.replace(config, mesh=MeshConfig(data=data, seq=seq), chunk_tokens=16, **changes)
    got, text = loss_and_gradients(run, parameters, batch)
    assert_trees_agree("gradients", got, whole)
    sums = [record for record in overlaps_in(text) if record.collective.kind == "all-reduce"]
    largest = max((record.collective.bytes for record in sums), default=0)
    # Over the ranks the gradients are summed once, not in every chunk.
    assert {record.runs for record in sums if record.collective.bytes == largest} <= {1}
    if seq > 1:
        assert largest > 4 * parameters["embedding/embedding"].size


def test_chunks_of_a_hybrid_model_are_refused():
    with pytest.raises(NotImplementedError, match="chunk_tokens: softmax layers"):
        make_objective(TrainConfig(model="hybrid-tiny", chunk_tokens=256), make_mesh(MeshConfig()))


def test_activations_are_those_of_one_chunk(config, parameters):
    def temporaries(length, **changes):
        run = dataclasses.replace(config, sequence_length=length, batch_size=1, **changes)
        shape = (1, length) if run.chunk_tokens is None else (length // run.chunk_tokens, 1, run.chunk_tokens)
        dtypes = Batch(np.int32, np.int32, np.int32, bool)
        abstract = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes))
        objective = make_objective(run, make_mesh(run.mesh))
        gradient = jax.jit(jax.grad(lambda parameters, batch: objective(parameters, batch).total))
        return gradient.lower(parameters, abstract).compile().memory_analysis().temp_size_in_bytes

    few, many = (temporaries(length, chunk_tokens=512) for length in (1024, 8192))
    # 14 more states of two layers with two heads [8, 16], and three tokens before the convolution.
    borders = 14 * 2 * 4 * (2 * 8 * 16 + 3 * 64)
    assert many < 1.05 * few + 2 * borders
    assert temporaries(8192) > 8 * many


def test_some_chunks_drawn_by_the_step_train(config, batch):
    run = dataclasses.replace(config, chunk_tokens=8, backprop_chunks=2, mesh=MeshConfig(seq=2))
    mesh = make_mesh(run.mesh)
    program = compile_program(run, mesh)
    placed = place(batch, mesh, 8)

    def losses():
        state, losses = program.create(), []
        for _ in range(30):
            state, metrics = program.train(state, placed)
            losses.append(float(metrics.loss))
        return losses

    # The reported loss is that of all chunks.
    evaluated = program.evaluate(program.create().parameters, placed)
    curve = losses()
    np.testing.assert_allclose(curve[0], evaluated.mean, rtol=1e-5)
    assert curve[-1] < 0.8 * curve[0]
    # The draw is a function of seed and step.
    assert losses() == curve
