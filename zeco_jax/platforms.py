"""Which devices a program is traced for: they need not be here, a program may be compiled for a pod."""

from typing import NamedTuple

import jax


class DeviceKind(NamedTuple):
    """What a device is.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: what JAX calls it, such as "TPU v5 lite".
    """

    platform: str
    kind: str


def device_in_scope() -> DeviceKind:
    """The devices of the mesh in whose `jax.shard_map` this is called; outside, those of this process.

    Example:
        >>> from zeco_jax.platforms import device_in_scope
        >>> device_in_scope().platform
        'cpu'
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        return DeviceKind(jax.default_backend(), jax.devices()[0].device_kind)
    platform = "tpu" if device.device_kind.lower().startswith("tpu") else jax.default_backend()
    return DeviceKind(platform, device.device_kind)


def platform_in_scope() -> str:
    """The platform of `device_in_scope`."""
    return device_in_scope().platform
