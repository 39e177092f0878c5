"""Mistakes that users make: one argument with a value that cannot be served."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest


@dataclass(frozen=True)
class Mistake:
    """`argument=value`, and the pattern of the names that the error may blame."""

    argument: str
    value: Any
    pattern: str

    def check(self, error: Exception) -> None:
        """The error must come from this package, not from deep inside JAX or NumPy."""
        frame = error.__traceback__
        files = []
        while frame:
            files.append(frame.tb_frame.f_code.co_filename)
            frame = frame.tb_next
        assert "zeco_jax" in files[-1], f"raised in {files[-1]}: {error}"


def _describe(value) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}".replace(" ", "")
    return re.sub(r"[^\w.,-]", "", repr(value))


def wrong(argument: str, value: Any, *, names: str | None = None, label: str | None = None):
    """A test parameter with a readable id; `names` when the error may as well blame another argument."""
    pattern = rf"\b({names or argument})\b"
    return pytest.param(Mistake(argument, value, pattern), id=f"{argument}-{label or _describe(value)}")
