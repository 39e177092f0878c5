import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zeco_jax.training import OptimizerConfig, TrainConfig, learning_rate_schedule, make_optimizer


def config(**options):
    return TrainConfig(steps=100, optimizer=OptimizerConfig(**options))


def test_the_learning_rate_rises_and_falls():
    schedule = learning_rate_schedule(config(learning_rate=1.0, warmup_steps=10, final_fraction=0.1))
    rates = [float(schedule(step)) for step in (0, 5, 10, 55, 100, 200)]
    np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, 0.55, 0.1, 0.1], rtol=1e-5)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.warmup_steps: got 100"):
        learning_rate_schedule(config(warmup_steps=100))


def test_only_kernels_and_embeddings_decay():
    optimizer = make_optimizer(config(learning_rate=0.1, warmup_steps=0, weight_decay=0.5))
    parameters = {name: jnp.ones((2, 3)) for name in ("embedding/embedding", "mlp/kernel", "norm/scale", "gate/bias")}
    gradient = {name: jnp.zeros((2, 3)) for name in parameters}
    updates, _ = optimizer.update(gradient, optimizer.init(parameters), parameters)
    changed = {name for name, update in updates.items() if jnp.any(update != 0)}
    assert changed == {"embedding/embedding", "mlp/kernel"}


def test_a_large_gradient_is_clipped():
    # Adam doesn't see the size of a gradient, so its first moment is looked at.
    optimizer = make_optimizer(config(clip_norm=0.5, beta1=0.5))
    parameters = {"kernel": jnp.zeros(4)}
    _, state = optimizer.update({"kernel": jnp.full(4, 100.0)}, optimizer.init(parameters), parameters)
    moment = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(np.linalg.norm(moment["kernel"]), 0.25, rtol=1e-5)
