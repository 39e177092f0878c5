"""A model as a pure function of a flat dictionary of named parameters.

Optimizer, checkpoints and reports see only the dictionary, so they know nothing of the module system.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding

from zeco_jax.collectives import AxisName
from zeco_jax.models import LinearAttentionLM, ModelConfig
from zeco_jax.parallel import SequenceSharding

Parameters = dict[str, jax.Array]
"""Parameters by their path in the model, e.g. "layers/0/attention/query/kernel"."""


@dataclass(frozen=True)
class Skeleton:
    """A model without its parameters.

    Attributes:
        config: The model's configuration.
        sharding: How its activations lie on a mesh; None on one device.
        axis_name: For use inside `jax.shard_map` instead: the mesh axis that cuts the tokens.
    """

    config: ModelConfig
    sharding: SequenceSharding | None = None
    axis_name: AxisName | None = None

    def initialize(self, seed: int, placement: Sharding | None = None) -> Parameters:
        """Draws the parameters; they depend on the seed only, not on the placement.

        Args:
            seed: Seed of the parameters.
            placement: Where every parameter lies. None: on the default device.

        Returns:
            The parameters, float32.
        """
        return jax.jit(lambda: _named(nnx.state(self._build(seed))), out_shardings=placement)()

    def assemble(self, parameters: Mapping[str, jax.Array]) -> LinearAttentionLM:
        """Puts parameters into the model; works inside and outside jit.

        Args:
            parameters: What `initialize` gave, or an update of it.

        Returns:
            The model.

        Raises:
            ValueError: A parameter is missing, superfluous or of another shape.
        """
        definition, state = nnx.split(nnx.eval_shape(lambda: self._build(0)))
        expected = _named(state)
        if expected.keys() != parameters.keys():
            unfit = sorted(expected.keys() ^ parameters.keys())
            raise ValueError(f"parameters: got names {unfit} that fit no parameter, or miss theirs")
        for name, leaf in expected.items():
            if leaf.shape != parameters[name].shape:
                raise ValueError(f"parameters[{name!r}]: got shape {parameters[name].shape}, expected {leaf.shape}")
        filled = [(path, variable.replace(parameters[_name(path)])) for path, variable in nnx.to_flat_state(state)]
        return nnx.merge(definition, nnx.from_flat_state(filled))

    def _build(self, seed: int) -> LinearAttentionLM:
        return LinearAttentionLM(self.config, sharding=self.sharding, axis_name=self.axis_name, rngs=nnx.Rngs(seed))


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _named(state: nnx.State) -> dict[str, Any]:
    """The arrays of a model's state by path."""
    named = {_name(path): jax.tree.leaves(variable)[0] for path, variable in nnx.to_flat_state(state)}
    other = [name for name, leaf in named.items() if not jnp.issubdtype(leaf.dtype, jnp.floating)]
    if other:
        raise TypeError(f"the model holds state that is no parameter: {other}; expected float arrays only")
    return named
