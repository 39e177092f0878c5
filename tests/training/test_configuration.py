import pytest

from zeco_jax.training import (
    Architecture,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    identity,
    model_config,
)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        pytest.param(lambda: TrainConfig(steps=0), "steps", id="no-steps"),
        pytest.param(lambda: TrainConfig(batch_size=0), "batch_size", id="no-batch"),
        pytest.param(lambda: TrainConfig(batch_size=3, mesh=MeshConfig(data=2)), "mesh.data", id="batch-not-divisible"),
        pytest.param(
            lambda: TrainConfig(sequence_length=100, mesh=MeshConfig(seq=8)), "mesh.seq", id="sequence-not-divisible"
        ),
        pytest.param(lambda: TrainConfig(precision="float16"), "precision", id="precision"),
        pytest.param(lambda: TrainConfig(seed=-1), "seed", id="negative-seed"),
        pytest.param(lambda: MeshConfig(seq=0), "mesh.seq", id="no-ranks"),
        pytest.param(lambda: DataConfig(validation_fraction=1.0), "validation_fraction", id="all-held-out"),
        pytest.param(lambda: OptimizerConfig(learning_rate=0.0), "learning_rate", id="no-learning-rate"),
        pytest.param(lambda: CheckpointConfig(keep=0), "checkpoint.keep", id="keep-none"),
        pytest.param(lambda: EvaluationConfig(prompt=""), "evaluation.prompt", id="empty-prompt"),
    ],
)
def test_an_impossible_value_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_the_model_follows_the_changes():
    config = TrainConfig(architecture=Architecture(num_layers=3, conv_width=0), precision="bfloat16", remat=True)
    model = model_config(config)
    assert (model.num_layers, model.conv_width, model.dtype, model.remat) == (3, 0, "bfloat16", True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(TrainConfig(model="huge"), "huge", id="unknown-model"),
        pytest.param(TrainConfig(architecture=Architecture(vocabulary_size=100)), "256", id="vocabulary-below-a-byte"),
        pytest.param(TrainConfig(architecture=Architecture(num_heads=7)), "num_heads", id="heads-do-not-divide"),
    ],
)
def test_an_impossible_model_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        model_config(config)


def test_the_mesh_is_no_part_of_the_identity():
    one, eight = TrainConfig(), TrainConfig(mesh=MeshConfig(seq=8), remat=True)
    assert identity(one, data_checksum=1) == identity(eight, data_checksum=1)
    assert identity(one, data_checksum=1) != identity(one, data_checksum=2)


def test_more_steps_are_another_identity_only_if_the_schedule_changes():
    def facts(steps, decay_steps):
        return identity(TrainConfig(steps=steps, optimizer=OptimizerConfig(decay_steps=decay_steps)), 0)

    assert facts(300, 300) == facts(600, 300)
    assert facts(300, None) != facts(600, None)
