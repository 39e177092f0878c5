import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.meshes import mesh
from zeco_jax.parallel import SequenceSharding
from zeco_jax.pods import overlaps_in
from zeco_jax.training import LossSum, bits_per_byte, cross_entropy, cross_entropy_of_hidden


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


def make(batch: int, tokens: int, width: int = 6, vocabulary: int = 11):
    """Hidden states, kernel, targets and mask."""
    seeds = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(seeds[0], (batch, tokens, width))
    kernel = jax.random.normal(seeds[1], (width, vocabulary))
    targets = jax.random.randint(seeds[2], (batch, tokens), 0, vocabulary)
    return hidden, kernel, targets, jax.random.bernoulli(seeds[3], 0.8, (batch, tokens))


def loss_and_gradients(of, hidden, kernel, targets, mask):
    def mean(hidden, kernel):
        return of(hidden, kernel, targets, mask).mean

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(hidden, kernel)


@pytest.mark.parametrize("block_tokens", [1, 7, 100])
@pytest.mark.parametrize("axis_type", [None, AxisType.Auto, AxisType.Explicit], ids=["one-device", "auto", "explicit"])
def test_blocks_of_tokens_change_nothing(block_tokens, axis_type):
    arrays = make(2, 24)
    sharding = None
    if axis_type is not None:
        sharding = SequenceSharding(mesh(data=2, seq=4, axis_type=axis_type), batch="data")
    of = functools.partial(cross_entropy_of_hidden, sharding=sharding, block_tokens=block_tokens)
    blocks = loss_and_gradients(of, *arrays)
    whole = loss_and_gradients(lambda hidden, kernel, *rest: cross_entropy(hidden @ kernel, *rest), *arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), blocks, whole)


def test_blocks_hold_few_logits_and_one_sum_over_the_ranks():
    hidden, kernel, targets, mask = make(1, 4096, vocabulary=512)
    sharding = SequenceSharding(mesh(seq=2))
    of = functools.partial(cross_entropy_of_hidden, sharding=sharding, block_tokens=64)

    def mean(hidden, kernel):
        return of(hidden, kernel, targets, mask).mean

    compiled = jax.jit(jax.grad(mean, argnums=(0, 1))).lower(hidden, kernel).compile()
    # A rank's 2048 tokens have four megabytes of logits, a block one in 32 of that.
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20
    sums = [record for record in overlaps_in(compiled.as_text()) if record.collective.kind == "all-reduce"]
    assert {record.runs for record in sums} == {1}


@pytest.mark.parametrize("block_tokens", [64, 1024], ids=["blocks", "one-block"])
def test_gradients_of_ranks_are_summed_in_float32(block_tokens):
    hidden, kernel, targets, mask = make(1, 1024)
    of = functools.partial(cross_entropy_of_hidden, sharding=SequenceSharding(mesh(seq=4)), block_tokens=block_tokens)
    gradient = jax.jit(jax.grad(lambda kernel: of(hidden.astype(jnp.bfloat16), kernel, targets, mask).mean))
    summed = re.findall(r"all_reduce.*?\) -> (tensor<\S+>)", gradient.lower(kernel).as_text(), re.DOTALL)
    assert "tensor<6x11xf32>" in summed
    assert not any("bf16" in kind for kind in summed)


def test_all_logits_of_a_long_sequence_never_exist():
    tokens, width, vocabulary = 32 * 1024, 1024, 128 * 1024
    shapes = [((1, tokens, width), jnp.bfloat16), ((width, vocabulary), jnp.float32)]
    hidden, kernel = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    targets, mask = (jax.ShapeDtypeStruct((1, tokens), dtype) for dtype in (jnp.int32, bool))

    def mean(hidden, kernel, targets, mask):
        return cross_entropy_of_hidden(hidden, kernel, targets, mask).mean

    compiled = jax.jit(jax.grad(mean, argnums=(0, 1))).lower(hidden, kernel, targets, mask).compile()
    # All logits would take 16 GiB; the kernel in bfloat16 and its gradient take 768 MiB of what is left.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 << 30


def test_impossible_block_is_named():
    with pytest.raises(ValueError, match=r"block_tokens.*got 0"):
        cross_entropy_of_hidden(*make(1, 4), block_tokens=0)
