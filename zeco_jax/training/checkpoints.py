"""Checkpoints with Orbax: written while training goes on, verified when they are read."""

import functools
import json
import operator
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from zeco_jax.models import LinearAttentionLM, ModelConfig
from zeco_jax.training.configuration import CheckpointConfig
from zeco_jax.training.parameters import Skeleton
from zeco_jax.training.step import TrainState

_FOLDER = "checkpoints"


class Restored(NamedTuple):
    """A checkpoint that was read back.

    Attributes:
        state: The state of training.
        progress: What the run had noted beside it, see `Checkpoints.save`.
    """

    state: TrainState
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run; a context manager, which waits for the last write at its end.

    A checkpoint has three parts: `parameters`; `training`, which is step, optimizer state and random key; and `run`,
    which is JSON: identity of the run, model configuration, data position and checksum. It appears under its final
    name only when it is complete, so a killed process leaves none that is half written; the checksum finds one that
    was damaged afterwards.

    Args:
        directory: The run's output directory.
        config: When checkpoints are written and how many stay.
        identity: The facts that a checkpoint must share with this run, see `identity`.
        model: Configuration of the model, kept for those who read the checkpoint without the run.
    """

    def __init__(
        self, directory: Path, config: CheckpointConfig, identity: Mapping[str, Any], model: Mapping[str, Any]
    ) -> None:
        self._folder = (directory / _FOLDER).absolute()
        self._damaged = self._folder.with_name("damaged-checkpoints")
        self._identity = dict(identity)
        self._model = dict(model)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
            item_names=("parameters", "training", "run"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def save(self, state: TrainState, progress: Mapping[str, Any]) -> None:
        """Saves the state; returns when it has been copied from the devices, and writes in the background.

        Args:
            state: The state.
            progress: JSON values to keep beside it, such as the index of the next batch.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        run = {
            "identity": self._identity,
            "model": self._model,
            "progress": dict(progress),
            "checksum": int(_checksum(state)),
        }
        training = {"step": state.step, "optimizer": state.optimizer, "key": state.key}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                parameters=ocp.args.StandardSave(state.parameters),
                training=ocp.args.StandardSave(training),
                run=ocp.args.JsonSave(run),
            ),
        )

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint, read or not; None if there is none."""
        return self._manager.latest_step()

    def restore(self, abstract: TrainState) -> Restored | None:
        """Reads the newest good checkpoint.

        A damaged one gives a warning, is moved to the folder `damaged-checkpoints`, and the one before is tried.

        Args:
            abstract: Shapes, types and shardings of the state, see `Program.abstract_state`.

        Returns:
            The checkpoint, or None if the run has none yet.

        Raises:
            ValueError: The checkpoint belongs to a run of another configuration, or all checkpoints are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
                identity, progress, checksum = run["identity"], run["progress"], run["checksum"]
            except Exception as error:  # Orbax and TensorStore have no common type for damaged files.
                self._set_aside(step, error)
                continue
            _require_same(identity, self._identity, self._folder)
            try:
                state = self._restore_state(step, abstract)
                if int(_checksum(state)) != checksum:
                    raise ValueError("its arrays don't have the checksum that was noted when they were saved")
            except Exception as error:
                self._set_aside(step, error)
                continue
            return Restored(state, progress)
        if steps:
            raise ValueError(
                f"output: all checkpoints in {str(self._folder)!r} were damaged and have been moved to "
                f"{str(self._damaged)!r}; run again to start from the beginning"
            )
        return None

    def _restore_state(self, step: int, abstract: TrainState) -> TrainState:
        training = {"step": abstract.step, "optimizer": abstract.optimizer, "key": abstract.key}
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                parameters=ocp.args.StandardRestore(abstract.parameters),
                training=ocp.args.StandardRestore(training),
            ),
        )
        training = items["training"]
        return TrainState(training["step"], items["parameters"], training["optimizer"], training["key"])

    def _set_aside(self, step: int, error: Exception) -> None:
        reason = str(error).strip().splitlines()
        warnings.warn(
            f"the checkpoint of step {step} in {str(self._folder)!r} is damaged and is not used "
            f"({type(error).__name__}: {reason[0] if reason else 'no message'}); trying the one before",
            stacklevel=3,
        )
        if jax.process_index() == 0:
            self._damaged.mkdir(exist_ok=True)
            target = self._damaged / str(step)
            shutil.rmtree(target, ignore_errors=True)
            (self._folder / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged checkpoint {step}")
        self._manager.reload()


def load_model(checkpoint: Path) -> LinearAttentionLM:
    """Reads the model of the newest checkpoint onto the default device.

    Args:
        checkpoint: Output directory of a run, or its folder of checkpoints, or one checkpoint.

    Returns:
        The model with the saved parameters.

    Raises:
        ValueError: There is no checkpoint, or it cannot be read.
    """
    folder = _newest_checkpoint(checkpoint)
    try:
        run = json.loads((folder / "run" / "metadata").read_text())
        config = ModelConfig(**run["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: the configuration in {str(folder)!r} cannot be read: {error}") from error
    skeleton = Skeleton(config)
    placement = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement),
        jax.eval_shape(lambda: skeleton.initialize(0)),
    )
    try:
        with ocp.StandardCheckpointer() as reader:
            parameters = reader.restore(folder / "parameters", abstract)
    except Exception as error:
        raise ValueError(f"checkpoint: the parameters in {str(folder)!r} cannot be read: {error}") from error
    return skeleton.assemble(parameters)


def _newest_checkpoint(path: Path) -> Path:
    """Folder of the newest checkpoint at or below `path`."""
    path = Path(path).absolute()
    if not path.is_dir():
        raise ValueError(
            f"checkpoint: got {str(path)!r}, which is no directory; expected the output directory of a run"
        )
    if (path / "parameters").is_dir():
        return path
    parent = path / _FOLDER if (path / _FOLDER).is_dir() else path
    steps = [folder for folder in parent.iterdir() if folder.name.isdigit() and (folder / "parameters").is_dir()]
    if not steps:
        raise ValueError(
            f"checkpoint: got {str(path)!r}, which has no checkpoint; expected the output directory of "
            "`python -m experiments.train`"
        )
    return max(steps, key=lambda folder: int(folder.name))


def _require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises one error that names all fields in which a checkpoint's run differs from this one."""
    # What JSON makes of tuples and the like must not count as a difference.
    wanted = json.loads(json.dumps(wanted))
    different = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if different:
        listing = "; ".join(
            f"{name}: the checkpoint has {found.get(name)!r}, this run {wanted.get(name)!r}" for name in different
        )
        raise ValueError(
            f"output: the checkpoints in {str(folder)!r} belong to a run of another configuration ({listing}); "
            "expected the same configuration, or another --output"
        )


@jax.jit
def _checksum(tree: Any) -> jax.Array:
    """Sum of the bits of all arrays as 32-bit words, modulo 2**32: does not depend on order or placement."""

    def words(leaf: jax.Array) -> jax.Array:
        unsigned = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        return jnp.sum(unsigned.astype(jnp.uint32), dtype=jnp.uint32)

    return functools.reduce(operator.add, map(words, jax.tree.leaves(tree)))
