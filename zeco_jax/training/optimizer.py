"""The optimizer: AdamW, warm-up and cosine, clipping."""

import optax

from zeco_jax.training.configuration import TrainConfig


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine down to the final share of the learning rate, then constant.

    Args:
        config: The run.

    Returns:
        Function from the step to the learning rate.

    Raises:
        ValueError: The warm-up doesn't end before the decay does.
    """
    options = config.optimizer
    if options.warmup_steps >= config.decay_steps:
        raise ValueError(
            f"optimizer.warmup_steps: got {options.warmup_steps}, expected fewer than the {config.decay_steps} steps "
            "until the end of the decay"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=options.warmup_steps,
        decay_steps=config.decay_steps,
        end_value=options.final_fraction * options.learning_rate,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with the run's schedule, after clipping by the global norm.

    Weight decay acts on kernels and embeddings, not on scales and biases; which is which, the name tells.

    Args:
        config: The run.

    Returns:
        The optax transformation, for parameters by name (see `Parameters`).

    Raises:
        ValueError: The schedule is impossible.

    Example:
        >>> import jax.numpy as jnp
        >>> from zeco_jax.training import TrainConfig, make_optimizer
        >>> optimizer = make_optimizer(TrainConfig())
        >>> state = optimizer.init({"norm/scale": jnp.ones(3)})
    """
    options = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=options.beta1,
            b2=options.beta2,
            eps=options.epsilon,
            weight_decay=options.weight_decay,
            mask=lambda parameters: {name: _decays(name) for name in parameters},
        ),
    )


def _decays(name: str) -> bool:
    return name.rpartition("/")[2] in ("kernel", "embedding")
