"""What a program does on a pod that isn't here: its memory, its bytes on the wire, and what hides them."""

from zeco_jax.pods.chips import Chip, chip_of
from zeco_jax.pods.hlo import Collective, collectives_in, permuted_bytes
from zeco_jax.pods.kernel_cycles import KernelSchedule, read_schedule, read_schedules
from zeco_jax.pods.memory import Buffer, CompiledStep, MemoryUse, compile_step, memory_use
from zeco_jax.pods.schedule import Overlap, Work, overlaps_in
from zeco_jax.pods.slices import KNOWN_SLICES, Slice, open_slice
from zeco_jax.pods.timeline import Rates, Timeline, Wait, timeline
from zeco_jax.pods.traffic import Traffic, traffic_in
from zeco_jax.pods.wires import Torus, Transit, Wires

__all__ = [
    "KNOWN_SLICES",
    "Buffer",
    "Chip",
    "Collective",
    "CompiledStep",
    "KernelSchedule",
    "MemoryUse",
    "Overlap",
    "Rates",
    "Slice",
    "Timeline",
    "Torus",
    "Traffic",
    "Transit",
    "Wait",
    "Wires",
    "Work",
    "chip_of",
    "collectives_in",
    "compile_step",
    "memory_use",
    "open_slice",
    "overlaps_in",
    "permuted_bytes",
    "read_schedule",
    "read_schedules",
    "timeline",
    "traffic_in",
]
