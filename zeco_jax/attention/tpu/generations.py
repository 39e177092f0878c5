"""What the kernels must know of the chip: how much VMEM a core has."""

import jax

_MIB = 2**20

# Per TensorCore, by `device_kind`, as in `pltpu.get_tpu_info_for_chip`.
VMEM_BYTES = {
    "TPU v4": 16 * _MIB,
    "TPU v5 lite": 128 * _MIB,
    "TPU v5e": 128 * _MIB,
    "TPU v5": 64 * _MIB,
    "TPU v5p": 64 * _MIB,
    "TPU v6 lite": 128 * _MIB,
    "TPU v6e": 128 * _MIB,
    "TPU7x": 64 * _MIB,
}
# The rest is XLA's.
_SHARE = 0.9


def vmem_budget(device_kind: str | None) -> int:
    """Bytes of VMEM that a kernel may take; for None what every generation has.

    Raises:
        NotImplementedError: for a device that isn't in the table.
    """
    if device_kind is None:
        return int(_SHARE * min(VMEM_BYTES.values()))
    if device_kind not in VMEM_BYTES:
        raise NotImplementedError(
            f'backend "tpu" doesn\'t know how much VMEM {device_kind!r} has; it knows {", ".join(VMEM_BYTES)}'
        )
    return int(_SHARE * VMEM_BYTES[device_kind])


def device_in_scope() -> tuple[str, str | None]:
    """Platform and kind of the devices of the mesh in scope, or else of this process's.

    They differ when a program is compiled for a pod that isn't there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform, device.device_kind
    platform = jax.default_backend()
    return platform, jax.devices()[0].device_kind
