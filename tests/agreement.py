"""How close is close: relative RMS against the oracle, with the tensor's name in the message."""

import numpy as np

# fp32 flushes what is smaller to zero; the oracle does not.
UNDERFLOW = 1e-37

RELATIVE_RMS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 5e-3}
LARGEST = {"bfloat16": 0.05}


def relative_rms(got, want) -> float:
    """Root mean square of the difference, in units of the root mean square of `want`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.sqrt(np.mean((got - want) ** 2)) / (np.sqrt(np.mean(want**2)) + UNDERFLOW))


def disagreement(name: str, got, want, dtype: str) -> str | None:
    """What is wrong with `got`, or None."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        return f"{name}: shape {got.shape}, expected {want.shape}"
    if not np.isfinite(got).all():
        return f"{name}: {np.size(got) - np.isfinite(got).sum()} of {np.size(got)} elements are not finite"
    if np.sqrt(np.mean((got - want) ** 2)) > RELATIVE_RMS[dtype] * np.sqrt(np.mean(want**2)) + UNDERFLOW:
        return f"{name}: relative RMS {relative_rms(got, want):.1e}, allowed {RELATIVE_RMS[dtype]:.0e}"
    if dtype in LARGEST:
        error, largest = np.abs(got - want).max(), np.abs(want).max()
        if error > LARGEST[dtype] * largest + UNDERFLOW:
            return f"{name}: one element is off by {error:.1e}, the largest is {largest:.1e}"
    return None


def assert_agrees(name: str, got, want, dtype: str = "float32") -> None:
    """Fail with the tensor's name and its error."""
    problem = disagreement(name, got, want, dtype)
    assert problem is None, problem
