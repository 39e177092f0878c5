"""What one device of a pod can do: figures of the data sheets, each with its source."""

import os
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: a chip, or a core of TPU7x.

    Attributes:
        name: what it goes by.
        memory: bytes of its main memory that a program may use.
        memory_bandwidth: bytes per second that it reads and writes there at best.
        peak_flops: bfloat16 multiplications and additions per second in matrix products at best.
        clock: cycles per second of the TPU compiler's estimates; 0 where it makes none.
        source: where the figures come from.
    """

    name: str
    memory: int
    memory_bandwidth: float
    peak_flops: float
    clock: float
    source: str


def _tpu(name: str, memory: float, memory_bandwidth: float, peak_flops: float, flops_per_cycle: int, page: str) -> Chip:
    return Chip(
        name,
        int(memory * GIB),
        memory_bandwidth,
        peak_flops,
        clock=peak_flops / flops_per_cycle,
        source=(
            f"docs.cloud.google.com/tpu/docs/{page}, memory: what libtpu 0.0.52 leaves a program; clock: peak over "
            f"{flops_per_cycle:,} operations a cycle"
        ),
    )


# Matrix units of 128 x 128 (256 x 256 from v6e on), two operations for each place: v5e has four of them, v4 and v5p
# eight, v6e and each core of TPU7x four.
_CHIPS = {
    "v4": _tpu("v4", 32, 1228e9, 275e12, 8 * 2 * 128**2, "v4"),
    "v5e": _tpu("v5e", 15.75, 819e9, 197e12, 4 * 2 * 128**2, "v5e"),
    "v5p": _tpu("v5p", 95, 2765e9, 459e12, 8 * 2 * 128**2, "v5p"),
    "v6e": _tpu("v6e", 31.24, 1638e9, 918e12, 4 * 2 * 256**2, "v6e"),
    "tpu7x": _tpu("tpu7x core", 94.74, 7380e9 / 2, 2307e12 / 2, 4 * 2 * 256**2, "tpu7x"),
    "a100": Chip("a100", 80 * 10**9, 2.039e12, 312e12, 0, "NVIDIA A100 data sheet, SXM 80 GB, without sparsity"),
    "h100 pcie": Chip("h100 pcie", 80 * 10**9, 2.0e12, 756e12, 0, "NVIDIA H100 data sheet, PCIe, without sparsity"),
    "h100 nvl": Chip("h100 nvl", 94 * 10**9, 3.9e12, 835e12, 0, "NVIDIA H100 data sheet, NVL, without sparsity"),
    "h100": Chip("h100", 80 * 10**9, 3.35e12, 989e12, 0, "NVIDIA H100 data sheet, SXM, without sparsity"),
    "h200": Chip("h200", 141 * 10**9, 4.8e12, 989e12, 0, "NVIDIA H200 data sheet, SXM, without sparsity"),
}
_KINDS = (
    ("v4", "v4"), ("v5 lite", "v5e"), ("v5e", "v5e"), ("v5", "v5p"), ("v6", "v6e"), ("7x", "tpu7x"), ("v7", "tpu7x"),
    ("a100", "a100"), ("h100 pcie", "h100 pcie"), ("h100 nvl", "h100 nvl"), ("h100", "h100"), ("h200", "h200"),
)  # fmt: skip


def chip_of(device_kind: str) -> Chip:
    """The chip that JAX calls `device_kind`.

    Raises:
        ValueError: none that is known.

    Example:
        >>> from zeco_jax.pods import chip_of
        >>> chip_of("TPU v5 lite").name, round(chip_of("TPU v5").clock / 1e9, 2)
        ('v5e', 1.75)
    """
    name = next((name for word, name in _KINDS if word in device_kind.lower()), None)
    if name is None:
        raise ValueError(f"device_kind: got {device_kind!r}, expected one of {', '.join(word for word, _ in _KINDS)}")
    return _CHIPS[name]


def share_of_this_machine(devices: int) -> Chip:
    """What each of `devices` virtual devices has of the machine that this runs on; rates are rough guesses."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count() or 1
    return Chip(
        f"1/{devices} of this machine",
        memory // devices,
        # That of a Link of virtual devices; of a core, a dozen operations at once at 3 GHz.
        memory_bandwidth=12.8e9 / devices,
        peak_flops=cores * 36e9 / devices,
        clock=0.0,
        source=f"memory: this machine's; rates: assumed, for {cores} cores",
    )
