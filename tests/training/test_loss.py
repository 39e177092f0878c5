import jax
import jax.numpy as jnp
import numpy as np

from zeco_jax.training import LossSum, bits_per_byte, cross_entropy


def test_only_masked_in_targets_count():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 7))
    targets = jax.random.randint(jax.random.key(1), (2, 5), 0, 7)
    mask = jnp.arange(10).reshape(2, 5) % 3 > 0
    loss = cross_entropy(logits, targets, mask)
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    picked = np.take_along_axis(log_probabilities, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss.total, -picked[np.asarray(mask)].sum(), rtol=1e-6)
    assert loss.count == mask.sum()


def test_narrow_logits_are_summed_in_float32():
    loss = cross_entropy(jnp.zeros((1, 4096, 256), jnp.bfloat16), jnp.zeros((1, 4096), int), jnp.ones((1, 4096), bool))
    assert loss.total.dtype == jnp.float32
    np.testing.assert_allclose(bits_per_byte(loss.mean), 8.0, rtol=1e-6)


def test_no_target_is_no_loss():
    assert LossSum(jnp.zeros(()), jnp.zeros(())).mean == 0
