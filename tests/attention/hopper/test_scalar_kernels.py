"""The kernels for scalar decays, simulated, against the recurrence in float64."""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.agreement import relative_rms
from zeco_jax.attention.hopper.chunk_gradients_scalar import chunk_gradients_scalar
from zeco_jax.attention.hopper.gradients_scalar import gate_gradient, gradients_scalar
from zeco_jax.attention.hopper.replay_scalar import replay_scalar
from zeco_jax.attention.hopper.states_scalar import chunk_states_scalar, stretch_states_scalar
from zeco_jax.attention.hopper.tile import CHUNK
from zeco_jax.attention.hopper.walk import Walk

SCALE = 0.1
# A stretch of two chunks and one of one.
CHUNKS, STRETCHES = 3, 2
STARTS = (0, 2 * CHUNK, CHUNKS * CHUNK)
TOLERANCE = 3e-3


def gates(kind, shape):
    rng = np.random.default_rng(1)
    if kind == "weak":
        return -0.05 * rng.uniform(size=shape) * (rng.uniform(size=shape) < 0.8)
    strong = rng.uniform(size=shape) < 0.3
    return np.where(strong, -rng.uniform(1, 120, size=shape), -0.01 * rng.uniform(size=shape))


@dataclass(frozen=True)
class Problem:
    """Random arguments; gates [1, T, H] where the sequences share them."""

    kind: str
    batch: int = 1
    heads: int = 1
    key_width: int = 128
    value_width: int = 128
    shared: bool = False

    @cached_property
    def arrays(self):
        rng = np.random.default_rng(0)
        shape = (self.batch, CHUNKS * CHUNK, self.heads)
        widths = {"q": self.key_width, "k": self.key_width, "v": self.value_width, "dout": self.value_width}
        return {name: jnp.asarray(rng.normal(size=(*shape, width)), jnp.bfloat16) for name, width in widths.items()}

    @cached_property
    def states(self):
        """The first state and the cotangent of the last."""
        rng = np.random.default_rng(2)
        shape = (2, self.batch, self.heads, self.key_width, self.value_width)
        return rng.normal(size=shape).astype(np.float32)

    @cached_property
    def gates(self):
        return gates(self.kind, (1 if self.shared else self.batch, CHUNKS * CHUNK, self.heads))

    @property
    def sums(self):
        by_chunk = np.moveaxis(self.gates, 1, 2).reshape(-1, self.heads, CHUNKS, CHUNK)
        return jnp.asarray(by_chunk.cumsum(-1).reshape(*by_chunk.shape[:2], -1), jnp.float32)

    def walk(self, *, reverse=False, closed=False):
        return Walk(CHUNKS, STRETCHES, reverse, closed)

    def recurrence(self, start=0, stop=CHUNKS * CHUNK, initial_state=None, dfinal=None):
        """The recurrence over some of the tokens."""
        part = {name: np.asarray(x, np.float64)[:, start:stop] for name, x in self.arrays.items()}
        every_gate = np.broadcast_to(self.gates, (self.batch, *self.gates.shape[1:]))[:, start:stop]
        if initial_state is None:
            initial_state = np.zeros_like(self.states[0])
        return oracle.recurrence(
            part["q"],
            part["k"],
            part["v"],
            every_gate,
            scale=SCALE,
            initial_state=initial_state,
            dout=part["dout"],
            dfinal=dfinal,
        )

    @cached_property
    def expected(self):
        return self.recurrence(0, CHUNKS * CHUNK, *self.states)

    def entering(self, starts):
        """The states before some tokens, [B, H, starts, K, V]."""
        return np.stack([self.recurrence(0, start, self.states[0]).final_state for start in starts], axis=2)

    def leaving(self, ends):
        """The cotangents of the states after some tokens, [B, H, ends, K, V]."""
        later = (self.recurrence(end, dfinal=self.states[1]).gradients["initial_state"] for end in ends)
        return np.stack(list(later), axis=2)


NARROW = [
    pytest.param(Problem("weak", batch=2, shared=True), id="shared"),
    pytest.param(Problem("strong", batch=2), id="own-strong"),
]
WIDE = [
    pytest.param(Problem("weak", key_width=256), id="two-key-tiles"),
    pytest.param(Problem("strong", value_width=384), id="three-value-tiles-strong"),
]


@pytest.fixture(params=NARROW + WIDE)
def problem(request):
    return request.param


def assert_states(states, want):
    for chunk in range(CHUNKS):
        assert relative_rms(states[:, :, chunk], want[:, :, chunk]) < TOLERANCE


class TestStates:
    def test_stretches(self, problem):
        walk = problem.walk()
        k, v = problem.arrays["k"], problem.arrays["v"]
        states = stretch_states_scalar(k, v, problem.sums, walk=walk, interpret=True)
        for stretch in range(STRETCHES):
            want = problem.recurrence(STARTS[stretch], STARTS[stretch + 1]).final_state
            assert relative_rms(states[:, :, stretch], want) < TOLERANCE

    def test_stretches_in_reverse(self, problem):
        walk = problem.walk(reverse=True)
        q, dout = problem.arrays["q"], problem.arrays["dout"]
        states = stretch_states_scalar(q, dout, problem.sums, walk=walk, scale=SCALE, interpret=True)
        for stretch in range(STRETCHES):
            want = problem.recurrence(STARTS[stretch], STARTS[stretch + 1]).gradients["initial_state"]
            assert relative_rms(states[:, :, stretch], want) < TOLERANCE

    def test_chunks(self, problem):
        entering = jnp.asarray(problem.entering(STARTS[:-1]), jnp.float32)
        k, v = problem.arrays["k"], problem.arrays["v"]
        states = chunk_states_scalar(k, v, problem.sums, entering, walk=problem.walk(), interpret=True)
        assert_states(states, problem.entering(range(0, CHUNKS * CHUNK, CHUNK)))


class TestReplay:
    def replay(self, problem, values, entering, **options):
        q, k = problem.arrays["q"], problem.arrays["k"]
        entering = jnp.asarray(entering, jnp.float32)
        return replay_scalar(q, k, values, problem.sums, entering, scale=SCALE, interpret=True, **options)

    def test_outputs(self, problem):
        entering, walk = problem.entering(STARTS[:-1]), problem.walk(closed=True)
        out, left = self.replay(problem, problem.arrays["v"], entering, walk=walk)
        assert relative_rms(out, problem.expected.out) < TOLERANCE
        assert relative_rms(left, problem.expected.final_state) < TOLERANCE

    @pytest.mark.parametrize("problem", NARROW[:1])
    def test_keeps_the_states_that_enter_the_chunks(self, problem):
        entering, walk = problem.entering(STARTS[:-1]), problem.walk()
        _, states = self.replay(problem, problem.arrays["v"], entering, walk=walk, keep_states=True)
        assert_states(states, problem.entering(range(0, CHUNKS * CHUNK, CHUNK)))

    @pytest.mark.parametrize("problem", WIDE)
    def test_in_reverse(self, problem):
        leaving, walk = problem.leaving(STARTS[1:]), problem.walk(reverse=True, closed=True)
        dv, left, states = self.replay(problem, problem.arrays["dout"], leaving, walk=walk, keep_states=True)
        assert relative_rms(dv, problem.expected.gradients["v"]) < TOLERANCE
        assert relative_rms(left, problem.expected.gradients["initial_state"]) < TOLERANCE
        assert_states(states, problem.leaving(range(CHUNK, (CHUNKS + 1) * CHUNK, CHUNK)))


class TestGradients:
    def assert_agree(self, problem, kernel, leaving, names, walk):
        *gradients, z, u, w, x = kernel(
            *(problem.arrays[name] for name in "qkv"),
            problem.sums,
            problem.arrays["dout"],
            jnp.asarray(problem.entering(range(0, CHUNKS * CHUNK, CHUNK)), jnp.bfloat16),
            leaving,
            walk=walk,
            scale=SCALE,
            interpret=True,
        )
        for name, got in zip(names, gradients, strict=True):
            assert relative_rms(got, problem.expected.gradients[name]) < TOLERANCE, name
        dgates = np.asarray(gate_gradient(z, u, w, x), np.float64)[..., 0]
        want = problem.expected.gradients["log_decay"]
        assert relative_rms(dgates, want) < TOLERANCE
        # Gradients of gates that decay to nearly nothing are right in their own size: nothing cancels.
        if problem.kind == "strong":
            small = np.abs(want) < 1e-6 * np.abs(want).max()
            assert np.median(np.abs(dgates / want - 1)[small]) < 5e-3

    @pytest.mark.parametrize("problem", NARROW)
    def test_all(self, problem):
        leaving = jnp.asarray(problem.leaving(STARTS[1:]), jnp.float32)
        self.assert_agree(problem, gradients_scalar, leaving, "qkv", problem.walk(reverse=True))

    @pytest.mark.parametrize("problem", WIDE)
    def test_chunk_by_chunk(self, problem):
        leaving = jnp.asarray(problem.leaving(range(CHUNK, (CHUNKS + 1) * CHUNK, CHUNK)), jnp.bfloat16)
        self.assert_agree(problem, chunk_gradients_scalar, leaving, "qk", problem.walk())

    def test_gates_are_summed_within_their_chunk(self):
        rng = np.random.default_rng(3)
        z, u, w = rng.normal(size=(3, 2, 1, 1, 2 * CHUNK))
        x = rng.normal(size=(2, 1, 1, 2, 128))
        got = gate_gradient(*(jnp.asarray(part, jnp.float32) for part in (z, u, w, x)))
        summed = [part.sum(0)[0, 0].reshape(2, CHUNK) for part in (z, u, w)]
        for chunk in range(2):
            z_part, u_part, w_part = (part[chunk] for part in summed)
            for token in range(CHUNK):
                want = z_part[token] + u_part[token:].sum() + w_part[:token].sum() + x[..., chunk, :].sum()
                np.testing.assert_allclose(got[0, chunk * CHUNK + token, 0, 0], want, rtol=1e-4, atol=1e-4)
