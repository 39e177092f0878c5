"""What a step takes of this machine's memory when it really runs on virtual devices, beside what was planned.

    python -m experiments.plan_measured < request.json    prints bytes, over all devices, as JSON

Runs the step that `experiments.plan_step` plans and reads from the kernel how far the process's resident memory rose:
from before the parameters were made, with the step already compiled, to the highest point during two steps.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

from experiments.plan_step import Request, training_step

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def measure(request: Request) -> dict[str, Any]:
    """Runs a step twice.

    Args:
        request: for a topology of virtual devices of this process.

    Returns:
        "resident": how far the resident memory rose, "planned": the plan's memory, both over all devices, in bytes.
    """
    import jax
    import jax.numpy as jnp

    from zeco_jax.pods import memory_use, open_slice

    slice_ = open_slice(request.topology)
    program, (state, batch) = training_step(request, slice_)
    train, create = program.train.lower(state, batch).compile(), program.create.lower().compile()
    planned = memory_use(train).total * slice_.size
    fill = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), batch),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, batch),
    )
    arguments = jax.block_until_ready(fill())
    before = _start_over()
    current = jax.block_until_ready(create())
    # What drawing the parameters took besides is gone before the step begins.
    _start_over()
    for _ in range(2):
        current, metrics = train(current, arguments)
        jax.block_until_ready((current, metrics))
    return {"resident": _resident("VmHWM") - before, "planned": planned, "devices": slice_.size}


def _start_over() -> int:
    """Gives freed memory back, forgets the highest point, and returns the resident bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def main() -> int:
    """Reads a request, prints what was measured."""
    import jax

    request = Request(**json.load(sys.stdin))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(request.topology.removeprefix("cpu:")))
    print(json.dumps(measure(request)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
