import jax
import numpy as np
import pytest

from zeco_jax.training import (
    Corpus,
    Document,
    MeshConfig,
    make_mesh,
    place,
    training_batches,
    validation_batches,
    window,
)


@pytest.fixture
def corpus():
    """Seven documents of 1 to 19 bytes."""
    return Corpus.from_documents([Document(str(n), bytes(range(65, 66 + 3 * n))) for n in range(7)])


def test_every_token_is_a_target_once(corpus):
    count = (corpus.tokens.size - 1) // 8
    targets = np.concatenate([window(corpus, 8, index).targets for index in range(count)])
    np.testing.assert_array_equal(targets, corpus.tokens[1 : 1 + 8 * count])


def test_the_first_token_of_a_document_is_no_target(corpus):
    for index in range((corpus.tokens.size - 1) // 8):
        part = window(corpus, 8, index)
        # A document begins where the separator was just read.
        np.testing.assert_array_equal(part.mask, part.inputs != 0)
        np.testing.assert_array_equal(np.diff(part.segment_ids), part.inputs[:-1] == 0)
        assert part.segment_ids[0] == 0


def test_batches_are_a_function_of_seed_and_step(corpus):
    def inputs(seed, step):
        return training_batches(corpus, batch_size=3, sequence_length=4, seed=seed)[step].inputs

    np.testing.assert_array_equal(inputs(5, 12), inputs(5, 12))
    assert any((inputs(5, step) != inputs(6, step)).any() for step in range(4))


def test_each_pass_has_an_order_of_its_own(corpus):
    count = (corpus.tokens.size - 1) // 4
    batches = training_batches(corpus, batch_size=1, sequence_length=4, seed=0)
    first, second = ([batches[step + n * count].inputs.tobytes() for step in range(count)] for n in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_validation_covers_the_text_once_and_fills_up_with_nothing(corpus):
    count = (corpus.tokens.size - 1) // 8
    batches = validation_batches(corpus, batch_size=4, sequence_length=8, limit=100)
    assert len(batches) == -(-count // 4)
    whole = sum(window(corpus, 8, index).mask.sum() for index in range(count))
    assert sum(batch.mask.sum() for batch in batches) == whole


def test_validation_is_limited(corpus):
    assert len(validation_batches(corpus, batch_size=2, sequence_length=4, limit=3)) == 3


@pytest.mark.parametrize("split", ["training", "validation"])
def test_too_little_text_is_named(corpus, split):
    make = {
        "training": lambda: training_batches(corpus, batch_size=2, sequence_length=4096, seed=0),
        "validation": lambda: validation_batches(corpus, batch_size=2, sequence_length=4096, limit=1),
    }[split]
    with pytest.raises(ValueError, match=rf"data: the {split} split has {corpus.tokens.size} bytes.*4097"):
        make()


def test_chunks_keep_the_order_of_tokens_rank_after_rank(corpus):
    batch = training_batches(corpus, batch_size=2, sequence_length=24, seed=0)[0]
    placed = place(batch, make_mesh(MeshConfig(seq=4)), chunk_tokens=8)
    for shard in placed.inputs.addressable_shards:
        part = slice(2 * shard.device.id, 2 * shard.device.id + 2)
        expected = [[row[8 * chunk :][part] for row in batch.inputs] for chunk in range(3)]
        np.testing.assert_array_equal(shard.data, expected)


def test_a_batch_is_cut_along_both_axes(corpus):
    batch = training_batches(corpus, batch_size=4, sequence_length=8, seed=0)[0]
    placed = place(batch, make_mesh(MeshConfig(data=2, seq=4)))
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    assert {shard.data.shape for shard in placed.inputs.addressable_shards} == {(2, 2)}
