"""The language model: all ways to run it agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tests.agreement import assert_agrees
from tests.layers.shared import SEGMENT_IDS, assert_trees_agree, make_sharding, meshes, value_and_gradients
from tests.meshes import mesh
from zeco_jax.attention import HopperBackend
from zeco_jax.models import LinearAttentionLM, ModelConfig
from zeco_jax.pods import collectives_in

CONFIG = ModelConfig(
    vocabulary_size=19, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, conv_width=4, mlp_multiple=16
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 40), 0, CONFIG.vocabulary_size)


def make(sharding=None, axis_name=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return LinearAttentionLM(config, sharding=sharding, axis_name=axis_name, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_is_embedding_blocks_norm_and_head(tied):
    model = make(tie_embeddings=tied)
    x = model.embedding.embedding[...][TOKENS]
    definition, stacked = nnx.split(model.blocks)
    for layer in range(CONFIG.num_layers):
        block = nnx.merge(definition, jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked))
        x = x + jax.jit(block.attention)(block.attention_norm(x))
        x = x + block.mlp(block.mlp_norm(x))
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps)
    kernel = model.embedding.embedding[...].T if tied else model.head.kernel[...]
    logits = jax.jit(model)(TOKENS)
    assert logits.dtype == jnp.float32
    assert_agrees("logits", logits, x @ kernel)


def test_layers_start_different_and_projections_into_the_stream_smaller():
    blocks = make(hidden_size=256, num_layers=8).blocks
    assert not np.array_equal(blocks.attention.qkv.kernel[0], blocks.attention.qkv.kernel[1])
    assert np.std(blocks.mlp.up.kernel[...]) == pytest.approx(0.02, rel=0.02)
    for projection in (blocks.mlp.down, blocks.attention.output):
        assert np.std(projection.kernel[...]) == pytest.approx(0.02 / 4, rel=0.02)


@pytest.fixture(scope="module")
def one_device():
    """Logits and gradients on one device."""
    return value_and_gradients(make(), TOKENS, SEGMENT_IDS)


@meshes
def test_sharded_equals_one_device(shape, axis_type, one_device):
    got = value_and_gradients(make(make_sharding(shape, axis_type)), TOKENS, SEGMENT_IDS)
    assert_trees_agree("sharded", got, one_device)


def test_inside_a_shard_map_of_the_user():
    definition, parameters = nnx.split(make(axis_name="seq"))
    tokens = PartitionSpec(None, "seq")
    run = jax.shard_map(
        lambda parameters, tokens: nnx.merge(definition, parameters)(tokens),
        mesh=mesh(seq=8),
        in_specs=(PartitionSpec(), tokens),
        out_specs=tokens,
    )
    assert_agrees("logits", jax.jit(run)(parameters, TOKENS), jax.jit(make())(TOKENS))


@pytest.mark.parametrize(
    "changes",
    [{"remat": True}, {"scan_unroll": 2}, {"remat": True, "remat_saves": "products", "scan_unroll": 2}],
    ids=["remat", "unrolled", "remat-unrolled"],
)
def test_how_layers_run_changes_nothing(changes, one_device):
    got = value_and_gradients(make(make_sharding((1, 8)), **changes), TOKENS, SEGMENT_IDS)
    assert_trees_agree(str(changes), got, one_device)


def test_remat_keeps_less():
    def kept_bytes(remat):
        definition, parameters = nnx.split(make(remat=remat, num_layers=8, conv_width=0))
        loss = jax.jit(jax.grad(lambda parameters: nnx.merge(definition, parameters)(TOKENS).sum()))
        return loss.lower(parameters).compile().memory_analysis().temp_size_in_bytes

    assert kept_bytes(remat=True) < 0.6 * kept_bytes(remat=False)


@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_remat_exchanges_nothing_again(kind):
    def exchanges(remat):
        definition, parameters = nnx.split(
            make(make_sharding((1, 8)), remat=remat, conv_width=0, layer_pattern=(kind,))
        )
        loss = jax.jit(jax.grad(lambda parameters: nnx.merge(definition, parameters)(TOKENS).sum()))
        compiled = loss.lower(parameters).compile().as_text()
        return sum(collective.kind != "all-reduce" for collective in collectives_in(compiled))

    assert exchanges(remat=True) == exchanges(remat=False) > 0


def test_remat_summarizes_nothing_again(monkeypatch):
    # Traced only, so that any device will do.
    monkeypatch.setattr(HopperBackend, "check", lambda *_: None)
    # Of one stretch nothing would have to be summarized.
    several_chunks = jnp.tile(TOKENS, (1, 5))

    def summaries(remat):
        definition, parameters = nnx.split(make(remat=remat, conv_width=0, dtype="bfloat16", backend="hopper"))
        loss = jax.grad(lambda parameters: nnx.merge(definition, parameters)(several_chunks).sum())
        return str(jax.make_jaxpr(loss)(parameters)).count("name=attention_summaries")

    assert summaries(remat=True) == summaries(remat=False) > 0


@pytest.mark.parametrize("shape", [None, (2, 4)], ids=["one-device", "2x4"])
def test_prefill_and_decode_equal_the_parallel_form(shape):
    want = jax.jit(make())(TOKENS)
    model = make(None if shape is None else make_sharding(shape))
    prefill, step = jax.jit(model.prefill), jax.jit(model.decode_step)
    cache = model.init_cache(2)
    for start, end in ((0, 32), (32, 37)):
        logits, cache = prefill(TOKENS[:, start:end], cache)
        assert_agrees(f"logits after {end} tokens", logits, want[:, end - 1])
    for t in range(37, 40):
        logits, cache = step(TOKENS[:, t], cache)
        assert_agrees(f"logits after token {t}", logits, want[:, t])


def test_bfloat16_computes_in_it_and_stays_close():
    model = make(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.hidden, TOKENS).dtype == jnp.bfloat16
    logits, want = jax.jit(model)(TOKENS), jax.jit(make())(TOKENS)
    assert logits.dtype == jnp.float32
    assert float(jnp.sqrt(jnp.mean((logits - want) ** 2) / jnp.mean(want**2))) < 2e-2


def test_learns():
    model = make(num_layers=1, conv_width=0)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(TOKENS[:, :-8])
            targets = TOKENS[:, 1:-7]
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[0] == pytest.approx(np.log(CONFIG.vocabulary_size), rel=0.05)
    assert losses[-1] < 0.5 * losses[0]


def test_refuses_what_are_no_tokens():
    with pytest.raises(ValueError, match=r"tokens must be integers with 2 dimensions, got float32 of shape \(2, 40\)"):
        make()(TOKENS.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"tokens must be integers with 1 dimensions, got int32 of shape \(2, 40\)"):
        make().decode_step(TOKENS, make().init_cache(2))
