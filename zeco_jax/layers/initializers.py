"""How parameters start."""

from flax import nnx

INITIAL_STDDEV = 0.02

default_kernel_init: nnx.Initializer = nnx.initializers.normal(INITIAL_STDDEV)

# Uniform within 1 / sqrt(W), as convolutions are usually started.
default_filter_init: nnx.Initializer = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
