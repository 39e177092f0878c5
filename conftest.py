"""What JAX reads before it starts: eight virtual CPU devices, for the tests and the doctests alike."""

import os

import pytest

VIRTUAL_DEVICES = 8


def _asks_for_gpu(config: pytest.Config) -> bool:
    words = config.option.markexpr.replace("(", " ").replace(")", " ").split()
    return any(word == "gpu" and words[i - 1 : i] != ["not"] for i, word in enumerate(words))


def pytest_configure(config: pytest.Config) -> None:
    """Choose the platform before JAX starts, here and in the processes that tests start: the CPU but for `-m gpu`."""
    if _asks_for_gpu(config):
        # Several workers share one card.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    elif os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
        # Compiling costs more than running here: a third of the time with LLVM's passes left out; the HLO is the same.
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

    import jax

    jax.config.update("jax_num_cpu_devices", VIRTUAL_DEVICES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return

    import jax

    if jax.default_backend() != "gpu":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU here"))
