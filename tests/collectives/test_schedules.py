import math
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

import zeco_jax
from tests import agreement, oracle
from tests.collectives.exchanges import FLAT, MESHES, all_scan_over, make, mesh_id
from tests.meshes import per_rank
from zeco_jax.collectives import cost
from zeco_jax.collectives.links import ICI_V5E, NETWORK_VARIABLE, torus
from zeco_jax.collectives.transpose import all_to_all_by_permutes


def cases_of(ranks: int):
    """Both directions of both kinds of decay, with an initial state and without: (arrays, cotangent, options)."""
    for decay, initial in (("channel", True), ("head", False)):
        arrays, cotangent = make(ranks, decay)
        if not initial:
            del arrays["initial_state"]
        for reverse in (False, True):
            yield arrays, cotangent, {"reverse": reverse}


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_all_to_all_by_permutes_equals_the_collective(ranks):
    """What stands in for an all-to-all on the rings of a TPU."""

    def both(x):
        collective = jax.lax.all_to_all(x, "seq", split_axis=0, concat_axis=0)
        return collective, all_to_all_by_permutes(x, "seq")

    x = np.random.default_rng(0).normal(size=(ranks, ranks, 3)).astype(np.float32)
    collective, permutes = jax.jit(per_rank(both, ranks))(x)
    np.testing.assert_array_equal(permutes, collective)


def test_transpose_on_a_ring_agrees_with_the_oracle(tmp_path, monkeypatch):
    torus(ICI_V5E).save(tmp_path / "ring.json")
    monkeypatch.setenv(NETWORK_VARIABLE, str(tmp_path / "ring.json"))
    assert_agrees_with_oracle((5,), schedule="transpose")
    assert_agrees_with_oracle((2, 4), schedule="hierarchical")


@pytest.mark.parametrize(("ranks", "most"), [(8, 3), (8, 1), (6, 2)], ids=["2x4", "2x2x2", "2x3"])
def test_one_axis_of_a_torus_in_levels(tmp_path, monkeypatch, ranks, most):
    torus(ICI_V5E).save(tmp_path / "torus.json")
    monkeypatch.setenv(NETWORK_VARIABLE, str(tmp_path / "torus.json"))
    monkeypatch.setattr(cost, "MOST_UNDER_WAY", most)
    assert_agrees_with_oracle((ranks,), schedule="hierarchical")


def assert_agrees_with_oracle(sizes: tuple[int, ...], *, check_vma: bool = True, **options):
    """Entering states and all gradients of all cases, in one program because compiling costs most."""
    cases = list(cases_of(math.prod(sizes)))

    def scan_all(inputs):
        results = []
        for (arrays, cotangent), (_, _, direction) in zip(inputs, cases, strict=True):
            scan = all_scan_over(sizes, check_vma=check_vma, **options, **direction)
            result, pullback = jax.vjp(lambda arrays, scan=scan: scan(**arrays), arrays)
            results.append((result, pullback(cotangent)[0]))
        return results

    results = jax.jit(scan_all)([case[:2] for case in cases])
    for (result, gradients), (arrays, cotangent, direction) in zip(results, cases, strict=True):
        want = oracle.all_scan(**arrays, **direction, dstate_in=cotangent)
        agreement.assert_agrees(f"state_in {direction}", result, want.out)
        assert gradients.keys() == arrays.keys()
        for name, gradient in gradients.items():
            agreement.assert_agrees(f"d{name} {direction}", gradient, want.gradients[name])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("schedule", FLAT)
def test_agrees_with_oracle(schedule, ranks):
    assert_agrees_with_oracle((ranks,), schedule=schedule)


@pytest.mark.parametrize("sizes", MESHES, ids=mesh_id)
@pytest.mark.parametrize("schedule", ["hierarchical", "auto"])
def test_agrees_with_oracle_on_several_axes(schedule, sizes):
    assert_agrees_with_oracle(sizes, schedule=schedule)


@pytest.mark.parametrize("schedule", [*FLAT, "hierarchical"])
def test_without_the_check_of_varying_axes(schedule):
    assert_agrees_with_oracle((3, 2), schedule=schedule, check_vma=False)


@pytest.mark.parametrize("schedule", [*FLAT, "hierarchical"])
def test_nothing_crosses_a_decay_of_zero(schedule):
    """Each rank sees its neighbour's state only, and sees it unchanged."""
    ranks = 5
    arrays, _ = make(ranks)
    arrays["decay"][:] = 0.0
    result = jax.jit(all_scan_over((ranks,), schedule=schedule))(**arrays)
    np.testing.assert_array_equal(result[0], arrays["initial_state"])
    np.testing.assert_array_equal(result[1:], arrays["state"][:-1])


@pytest.mark.parametrize("schedule", [*FLAT, "hierarchical"])
def test_in_half_precision(schedule):
    """Sums in bfloat16 are coarse, but the dtype is kept and what is computed is the same."""
    arrays, _ = make(4, "head")
    run = per_rank(lambda state, decay: zeco_jax.all_scan(state, decay, "seq", schedule=schedule), 4)
    result = jax.jit(run)(arrays["state"].astype(jax.numpy.bfloat16), arrays["decay"])
    assert result.dtype == jax.numpy.bfloat16
    want = oracle.all_scan(arrays["state"], arrays["decay"]).out
    assert agreement.relative_rms(result, want) < 0.02


MANY_RANKS = textwrap.dedent("""
    import jax
    import numpy as np

    jax.config.update("jax_num_cpu_devices", 256)

    from tests import agreement, oracle
    from tests.collectives.exchanges import all_scan_over, make

    for reverse in (False, True):
        arrays, _ = make(256)
        # Far neighbours must still be heard of.
        arrays["decay"] = arrays["decay"] ** 0.01
        want = oracle.all_scan(**arrays, reverse=reverse).out
        flat = [(schedule, (256,)) for schedule in ("chain", "doubling", "gather")]
        for schedule, sizes in [*flat, ("hierarchical", (16, 16))]:
            if reverse and schedule == "chain":
                continue
            result = jax.jit(all_scan_over(sizes, schedule=schedule, reverse=reverse))(**arrays)
            agreement.assert_agrees(f"{schedule}, reverse={reverse}", result, want)
            print("right:", schedule, reverse)
""")


@pytest.mark.slow
def test_256_ranks():
    """In a process of its own, because virtual devices are counted once per process."""
    done = subprocess.run([sys.executable, "-c", MANY_RANKS], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("right:") == 7
