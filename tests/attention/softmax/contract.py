"""What a softmax backend owes its users: subclass, name the backend, and run."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import agreement
from tests.attention.softmax import cases
from tests.attention.softmax.oracle import softmax_oracle_gradients
from zeco_jax.attention.softmax import SoftmaxBackend, documents_of, merge


class SoftmaxBackendContract:
    """Values and gradients of whole sequences and of blocks that are merged, against the oracle."""

    backend: SoftmaxBackend
    covers: tuple[cases.Case, ...] = cases.EVERY
    split: cases.Case = cases.GROUPED

    def pytest_generate_tests(self, metafunc):
        """Run the tests that want one on each of the subclass's cases."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", metafunc.cls.covers, ids=lambda case: case.name)

    def assert_agrees(self, case, arrays, out, gradients):
        """Compare with the oracle; report everything that is wrong at once."""
        want, want_gradients = softmax_oracle_gradients(*arrays[:4], case.scale, arrays.segment_ids)
        found = {"out": (out, want)}
        found |= {
            f"d{name}": pair for name, pair in zip("qkv", zip(gradients, want_gradients, strict=True), strict=True)
        }
        problems = [agreement.disagreement(name, *pair, case.dtype) for name, pair in found.items()]
        assert not any(problems), "\n".join(["disagrees with the oracle:", *filter(None, problems)])

    def test_agrees_with_oracle(self, case):
        arrays = cases.arrays(case)
        scale = case.key_width**-0.5 if case.scale is None else case.scale

        @jax.jit
        def run(q, k, v, dout, documents):
            options = {"scale": scale, "causal": True, "query_documents": documents, "key_documents": documents}
            out, log_sum_exp = self.backend.attend(q, k, v, **options)
            return out, log_sum_exp, self.backend.adjoint(q, k, v, out, log_sum_exp, dout, **options)

        documents = None if arrays.segment_ids is None else documents_of(arrays.segment_ids)
        out, log_sum_exp, gradients = run(*arrays[:4], documents)
        sums = jnp.float64 if case.dtype == "float64" else jnp.float32
        assert out.dtype in (sums, arrays.q.dtype)
        assert {log_sum_exp.dtype, *(gradient.dtype for gradient in gradients)} == {jnp.dtype(sums)}
        self.assert_agrees(case, arrays, out, gradients)

    def test_blocks_merge_to_the_whole(self):
        """Two blocks of queries of different lengths, the second with two blocks of keys: what a ring does."""
        case = self.split
        arrays = cases.arrays(case)
        documents = documents_of(arrays.segment_ids)
        first, second = np.s_[:, :15], np.s_[:, 15:]

        @jax.jit
        def run(q, k, v, dout):
            def options(queries, keys):
                visible = {"query_documents": documents[queries], "key_documents": documents[keys]}
                return {"scale": case.key_width**-0.5, "causal": queries == keys, **visible}

            pairs = ((first, first), (second, first), (second, second))
            parts = [
                self.backend.attend(q[queries], k[keys], v[keys], **options(queries, keys)) for queries, keys in pairs
            ]
            merged = {0: parts[0], 1: merge(parts[1], parts[2])}
            gradients = [jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)) for x in (q, k, v)]
            for (queries, keys), row in zip(pairs, (0, 1, 1), strict=True):
                shares = self.backend.adjoint(
                    q[queries], k[keys], v[keys], *merged[row], dout[queries], **options(queries, keys)
                )
                places = (queries, keys, keys)
                gradients = [
                    total.at[place].add(share) for total, place, share in zip(gradients, places, shares, strict=True)
                ]
            return jnp.concatenate([merged[0][0], merged[1][0]], axis=1), gradients

        self.assert_agrees(case, arrays, *run(*arrays[:4]))

    def test_queries_that_see_nothing(self):
        """A block with none of their documents' keys: nothing comes of it, forwards or backwards."""
        case = self.split
        q, k, v, dout, _ = cases.arrays(case)
        keys = k[:, :22], v[:, :22]
        # Every second query belongs to a document that isn't there.
        query_documents = jnp.broadcast_to(7 * (jnp.arange(q.shape[1]) % 2), q.shape[:2])
        options = {
            "scale": 1.0,
            "causal": False,
            "query_documents": query_documents,
            "key_documents": jnp.zeros((q.shape[0], 22), jnp.int32),
        }

        @jax.jit
        def run(q, k, v, dout):
            out, log_sum_exp = self.backend.attend(q, k, v, **options)
            return out, log_sum_exp, self.backend.adjoint(q, k, v, out, log_sum_exp, dout, **options)

        out, log_sum_exp, gradients = run(q, *keys, dout)
        np.testing.assert_array_equal(out[:, 1::2].astype(np.float32), 0)
        np.testing.assert_array_equal(log_sum_exp[:, 1::2], -np.inf)
        np.testing.assert_array_equal(gradients[0][:, 1::2], 0)
        assert np.isfinite(log_sum_exp[:, ::2]).all()
        alone = run(q, *keys, dout * (1 - np.arange(q.shape[1]) % 2)[:, None, None].astype(dout.dtype))
        for name, found, expected in zip("qkv", gradients, alone[2], strict=True):
            agreement.assert_agrees(f"d{name}", found, expected)

    def test_log_sum_exp(self):
        case = self.split
        q, k, v, *_ = cases.arrays(case)
        _, found = self.backend.attend(*map(jnp.asarray, (q, k, v)), scale=0.5, causal=False)
        repeated = np.repeat(k, case.heads // case.key_heads, axis=2)
        scores = 0.5 * np.einsum("bthk,bshk->bths", *(x.astype(np.float64) for x in (q, repeated)))
        agreement.assert_agrees("log_sum_exp", found, np.log(np.exp(scores).sum(-1)))
