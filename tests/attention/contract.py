"""What linear attention owes its users, whatever computes it: subclass, say how to call it, and run."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import agreement, oracle
from tests.attention import cases


class LinearAttentionContract:
    """Values, final state and every gradient against the oracle.

    A subclass gives `attend`; `ranks` rounds every length to a multiple; `covers` may be fewer.
    """

    ranks: int = 1
    covers: tuple[cases.Case, ...] = cases.EVERY

    def attend(self, q, k, v, log_decay=None, *, initial_state=None, segment_ids=None, **options):
        """Call the implementation on whole arrays; returns (out, final_state)."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc):
        """Run the tests that want one on each of the subclass's cases."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", metafunc.cls.covers, ids=lambda case: case.name)

    def compiled(self, case: cases.Case) -> Callable:
        """A jitted (differentiable, segment_ids, dout, dfinal) -> gradients, (out, final_state)."""

        def loss(differentiable, segment_ids, dout, dfinal):
            out, final_state = self.attend(**differentiable, segment_ids=segment_ids, **case.options)
            total = 0.0
            if "out" in case.loss:
                total += jnp.sum(out.astype(dfinal.dtype) * dout)
            if "final_state" in case.loss:
                total += jnp.sum(final_state * dfinal)
            return total, (out, final_state)

        return jax.jit(jax.grad(loss, has_aux=True))

    def assert_agrees(self, case: cases.Case, arrays: cases.Arrays, result) -> None:
        """Compare each head of each tensor; report everything that is wrong at once."""
        gradients, (out, final_state) = result
        want = oracle.recurrence(
            **arrays.differentiable,
            scale=case.options.get("scale"),
            segment_ids=arrays.segment_ids,
            dout=arrays.dout if "out" in case.loss else None,
            dfinal=arrays.dfinal if "final_state" in case.loss else None,
        )
        assert out.dtype == jnp.dtype(case.dtype)
        assert final_state.dtype == arrays.dfinal.dtype
        for name, gradient in gradients.items():
            assert gradient.dtype == arrays.differentiable[name].dtype, name

        tensors = {"out": (out, want.out), "final_state": (final_state, want.final_state)}
        tensors |= {f"d{name}": (gradients[name], want.gradients[name]) for name in gradients}
        problems = []
        for name, (got, expected) in tensors.items():
            assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
            if expected.ndim == 1 and case.dtype == "bfloat16":
                # One number for each head, a sum whose terms cancel: in bf16 only their RMS means something.
                problems.append(agreement.disagreement(name, got, expected, case.dtype))
                continue
            slices = [cases.head_slices(name.removeprefix("d"), x, case.heads) for x in (got, expected)]
            for regime, got_head, expected_head in zip(case.regimes, *slices, strict=True):
                label = name if case.decay == "none" else f"{name} of the head with decay {regime}"
                problems.append(agreement.disagreement(label, got_head, expected_head, case.dtype))
        problems = [problem for problem in problems if problem]
        assert not problems, "\n".join(["disagrees with the oracle:", *problems])

    def test_agrees_with_oracle(self, case):
        arrays = cases.arrays(case, self.ranks)
        result = self.compiled(case)(arrays.differentiable, arrays.segment_ids, arrays.dout, arrays.dfinal)
        self.assert_agrees(case, arrays, result)


class AnyPackingContract(LinearAttentionContract):
    """With random packings on top."""

    def test_any_packing(self):
        case = cases.Case("any_packing", regimes=("near_one", "gla"), tokens=40, value_width=8, segments="odd_places")
        arrays = cases.arrays(case, self.ranks)
        run = self.compiled(case)
        rng = np.random.default_rng(0)
        for change_rate in (0.0, 0.02, 0.05, 0.2, 0.5, 1.0):
            changes = rng.uniform(size=arrays.segment_ids.shape) < change_rate
            # Only a change counts: the ids may return, fall or jump.
            ids = (np.cumsum(changes, 1) * 5 % 3).astype(np.int32)
            packed = cases.Arrays(arrays.differentiable, ids, arrays.dout, arrays.dfinal)
            self.assert_agrees(case, packed, run(packed.differentiable, ids, packed.dout, packed.dfinal))


class Float64Contract(LinearAttentionContract):
    """The same in double precision, where a wrong formula cannot hide behind rounding."""

    covers = (
        cases.Case(
            "channel-every_regime-float64",
            regimes=cases.EVERY_REGIME,
            tokens=100,
            value_width=8,
            dtype="float64",
            gate_dtype="float64",
            segments="odd_places",
        ),
    )

    @pytest.fixture(autouse=True)
    def _double_precision(self):
        with jax.enable_x64(True):
            yield
