import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from zeco_jax.training import CheckpointConfig, Checkpoints, MeshConfig, TrainState, load_model, make_mesh

IDENTITY = {"seed": 0, "model.hidden_size": 32, "optimizer.learning_rate": 1e-3}


def state_at(step, ranks=8):
    """A state whose every number depends on the step, replicated over the ranks."""
    parameters = {"blocks/kernel": jnp.arange(600.0).reshape(20, 30) + step, "norm/scale": jnp.ones(30) * step}
    optimizer = optax.adam(1e-3).init(parameters)
    state = TrainState(jnp.int32(step), parameters, optimizer, jax.random.key_data(jax.random.key(step)))
    return jax.device_put(state, NamedSharding(make_mesh(MeshConfig(seq=ranks)), PartitionSpec()))


def abstract(ranks=8):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0, ranks))


def open_checkpoints(directory, identity=IDENTITY, keep=3):
    return Checkpoints(directory, CheckpointConfig(keep=keep), identity, {})


def save(directory, *steps, **options):
    with open_checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step), {"next_batch": step})


def restore(directory, ranks=8, **options):
    with open_checkpoints(directory, **options) as checkpoints:
        return checkpoints.restore(abstract(ranks))


def content_file(part: Path) -> Path:
    """The file with the arrays, or the JSON; beside them lie descriptions that a restore can do without."""
    content = part / "d" if (part / "d").is_dir() else part
    return max((path for path in content.iterdir() if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def assert_restored(restored, step):
    assert restored.progress == {"next_batch": step}
    jax.tree.map(np.testing.assert_array_equal, restored.state, state_at(step))


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_what_was_saved_on_8_devices_comes_back_on(tmp_path, ranks):
    save(tmp_path, 3)
    restored = restore(tmp_path, ranks)
    assert_restored(restored, 3)
    assert len(restored.state.parameters["norm/scale"].sharding.device_set) == ranks


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restore(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["3", "4"]


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink], ids=["truncated", "changed", "deleted"])
@pytest.mark.parametrize("part", ["parameters", "training", "run"])
def test_a_damaged_checkpoint_gives_a_warning_and_the_one_before_is_used(tmp_path, part, damage):
    save(tmp_path, 5, 6)
    damage(content_file(tmp_path / "checkpoints" / "6" / part))
    with pytest.warns(UserWarning, match="checkpoint of step 6 .* is damaged"):
        restored = restore(tmp_path)
    assert_restored(restored, 5)
    # The step can be saved again, and the damaged one is kept for whoever wants to look at it.
    save(tmp_path, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_restored(restore(tmp_path), 6)
    assert (tmp_path / "damaged-checkpoints" / "6").is_dir()


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    save(tmp_path, 5)
    unfinished = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    (unfinished / "parameters").write_bytes(b"half")
    assert_restored(restore(tmp_path), 5)


def test_when_all_are_damaged_the_run_does_not_start_anew_by_itself(tmp_path):
    save(tmp_path, 5, 6)
    for step in "56":
        truncate(content_file(tmp_path / "checkpoints" / step / "parameters"))
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="output: all checkpoints"):
        restore(tmp_path)


def test_another_configuration_is_refused_with_the_fields_named(tmp_path):
    save(tmp_path, 5)
    other = {**IDENTITY, "model.hidden_size": 64, "seed": 1}
    with pytest.raises(ValueError, match="another configuration") as caught:
        restore(tmp_path, identity=other)
    message = str(caught.value)
    assert "model.hidden_size: the checkpoint has 32, this run 64" in message
    assert "seed: the checkpoint has 0, this run 1" in message
    assert "learning_rate" not in message
    assert_restored(restore(tmp_path), 5)


@pytest.mark.parametrize("make", [lambda path: path / "nowhere", lambda path: path], ids=["missing", "empty"])
def test_a_directory_without_checkpoints_is_no_model(tmp_path, make):
    with pytest.raises(ValueError, match=r"checkpoint: got .* expected the output directory"):
        load_model(make(tmp_path))


def test_a_checkpoint_without_a_model_configuration_is_refused(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "checkpoints" / "5" / "run" / "metadata").write_text("{}")
    with pytest.raises(ValueError, match=r"configuration .* cannot be read"):
        load_model(tmp_path)
