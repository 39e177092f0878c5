"""What the kernels must know of the chip."""

from typing import NamedTuple

_MIB = 2**20
# The rest is for XLA, and for what the estimate of a kernel's needs leaves out.
_SHARE = 0.75


class Generation(NamedTuple):
    """One generation of TPUs, as in `pltpu.get_tpu_info_for_chip`.

    Attributes:
        vmem_bytes: VMEM of a core.
        matrix_unit: rows and columns of a matrix unit.
        cores: of a device, which share out what a kernel's grid calls parallel.
    """

    vmem_bytes: int
    matrix_unit: int
    cores: int = 1

    @property
    def budget(self) -> int:
        """Bytes of VMEM that a kernel may take."""
        return int(_SHARE * self.vmem_bytes)


_V5E, _V5P, _V6E = Generation(128 * _MIB, 128), Generation(64 * _MIB, 128, cores=2), Generation(128 * _MIB, 256)

GENERATIONS = {
    "TPU v4": Generation(16 * _MIB, 128, cores=2),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": Generation(64 * _MIB, 256),
}
"""By `device_kind`."""

# What every generation has, for simulations.
SMALLEST = Generation(16 * _MIB, 128)


def generation_of(device_kind: str) -> Generation:
    """The generation that JAX calls `device_kind`.

    Raises:
        NotImplementedError: for a device that isn't in the table.
    """
    if device_kind not in GENERATIONS:
        raise NotImplementedError(
            f"the kernels don't know how much VMEM {device_kind!r} has, only {', '.join(GENERATIONS)}"
        )
    return GENERATIONS[device_kind]
