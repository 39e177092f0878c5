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
        pytest.param(lambda: TrainConfig(mlp_block_tokens=0), "mlp_block_tokens", id="empty-mlp-blocks"),
        pytest.param(lambda: TrainConfig(loss_block_tokens=0), "loss_block_tokens", id="empty-loss-blocks"),
        pytest.param(lambda: TrainConfig(chunk_tokens=0), "chunk_tokens", id="empty-chunks"),
        pytest.param(lambda: TrainConfig(chunk_tokens=1000), "sequence_length = 1024", id="chunks-not-dividing"),
        pytest.param(
            lambda: TrainConfig(chunk_tokens=4, mesh=MeshConfig(seq=8)), "mesh.seq = 8", id="chunks-below-the-ranks"
        ),
        pytest.param(lambda: TrainConfig(backprop_chunks=2), "chunk_tokens beside it", id="backprop-without-chunks"),
        pytest.param(
            lambda: TrainConfig(chunk_tokens=256, backprop_chunks=5), "1 to the 4 chunks", id="backprop-too-many"
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


def test_blocks_of_the_feed_forward_layer_follow_the_run():
    def tokens(asked, precision):
        return model_config(TrainConfig(mlp_block_tokens=asked, precision=precision)).mlp_block_tokens

    assert tokens(None, "float32") is None
    assert tokens(700, "float32") == 700
    # Tiny's feed-forward layer has 384 features: six such rows in 128 MiB.
    assert tokens("auto", "bfloat16") == (128 << 20) // (6 * 384 * 2) // 128 * 128
    assert tokens("auto", "float32") == (128 << 20) // (6 * 384 * 4) // 128 * 128


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


def test_chunks_are_part_of_the_identity_only_if_some_are_left_out():
    def facts(**changes):
        return identity(TrainConfig(**changes), data_checksum=1)

    assert facts(chunk_tokens=128, mlp_block_tokens=64, loss_block_tokens=8) == facts()
    assert facts(chunk_tokens=128, backprop_chunks=2)["backprop_chunks"] == 2


def test_more_steps_are_another_identity_only_if_the_schedule_changes():
    def facts(steps, decay_steps):
        return identity(TrainConfig(steps=steps, optimizer=OptimizerConfig(decay_steps=decay_steps)), 0)

    assert facts(300, 300) == facts(600, 300)
    assert facts(300, None) != facts(600, None)
