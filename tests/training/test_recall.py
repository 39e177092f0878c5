"""Recall across ranks: the last rank is asked what the first was told, and only the exchange can bring it there."""

import importlib

import jax
import numpy as np
import pytest

from zeco_jax.parallel import AllScanExchange, SequenceSharding
from zeco_jax.training import (
    Architecture,
    Batch,
    MeshConfig,
    OptimizerConfig,
    Skeleton,
    TrainConfig,
    compile_program,
    make_mesh,
    place,
)

RANKS = 8
KEYS = 2
VALUES = 8
STEPS = 120

CONFIG = TrainConfig(
    # Without a convolution, whose halo is another way from rank to rank.
    architecture=Architecture(num_layers=2, hidden_size=64, num_heads=2, gate_normalizer=256.0, conv_width=0),
    mesh=MeshConfig(seq=RANKS),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20, weight_decay=0.0),
    steps=STEPS,
    batch_size=64,
    sequence_length=RANKS * KEYS,
)


def recall_batch(random: np.random.Generator) -> Batch:
    """Every token of the first rank says "key k has value v"; every token of the last asks for a key's value."""
    rows = CONFIG.batch_size
    values = random.integers(0, VALUES, (rows, KEYS))
    told = random.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)
    asked = random.permuted(told, axis=1)
    inputs = np.zeros((rows, CONFIG.sequence_length), np.int32)
    targets = np.zeros_like(inputs)
    inputs[:, :KEYS] = 1 + KEYS + told * VALUES + np.take_along_axis(values, told, 1)
    inputs[:, -KEYS:] = 1 + asked
    targets[:, -KEYS:] = 1 + np.take_along_axis(values, asked, 1)
    return Batch(inputs, targets, np.zeros_like(inputs), targets > 0)


def accuracy_after_training() -> float:
    mesh = make_mesh(CONFIG.mesh)
    program = compile_program(CONFIG, mesh)
    random = np.random.default_rng(0)
    state = program.create()
    for _ in range(STEPS):
        state, metrics = program.train(state, place(recall_batch(random), mesh))
        jax.block_until_ready(metrics)
    model = Skeleton(program.model, SequenceSharding(mesh, batch="data"))
    answer = jax.jit(lambda parameters, batch: model.assemble(parameters)(batch.inputs).argmax(-1))
    right = []
    for _ in range(8):
        batch = recall_batch(random)
        answers = np.asarray(answer(state.parameters, place(batch, mesh)))
        right.append((answers == batch.targets)[batch.mask])
    return float(np.mean(right))


def test_recall_is_solved_over_8_ranks():
    assert accuracy_after_training() > 0.95


class NoExchange(AllScanExchange):
    """Every rank begins from nothing, forwards and backwards."""

    def forward(self, summary, initial_state):
        return 0 * summary.state

    def reverse(self, summary):
        return 0 * summary.state


@pytest.fixture
def exchange_cut_out(monkeypatch):
    # The package's name for this module is the function of the same name.
    module = importlib.import_module("zeco_jax.parallel.linear_attention")
    monkeypatch.setattr(module, "AllScanExchange", NoExchange)
    # What was traced with the exchange must not be taken for what is traced without it, nor the reverse.
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("exchange_cut_out")
def test_recall_fails_when_the_exchange_is_cut_out():
    assert accuracy_after_training() < 1.5 / VALUES
