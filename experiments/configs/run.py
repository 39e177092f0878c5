"""A training run and the devices it runs on."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from zeco_jax.training import DeviceConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What to train and on which devices.

    Attributes:
        training: The run.
        devices: The devices and processes.
    """

    training: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    devices: Annotated[DeviceConfig, tyro.conf.arg(name="")] = field(default_factory=DeviceConfig)
