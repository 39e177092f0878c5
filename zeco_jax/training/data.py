"""Batches of packed documents: every batch is a function of the seed and its index, so a run can go on anywhere."""

import functools
from typing import NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zeco_jax.training.corpus import Corpus


class Batch(NamedTuple):
    """Windows of packed documents. Without its leading axis it is one window.

    The targets are made from a window of T + 1 tokens before the batch is spread over the devices, so no rank needs a
    token of its neighbour.

    Attributes:
        inputs: [B, T] int32.
        targets: The token after each input, [B, T] int32.
        segment_ids: The document of each input, counted from 0 in every window, [B, T] int32.
        mask: Whether the target counts: False where it belongs to another document than its input, [B, T] bool.
    """

    inputs: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    segment_ids: jax.Array | np.ndarray
    mask: jax.Array | np.ndarray


def window(corpus: Corpus, sequence_length: int, index: int) -> Batch:
    """The window of a corpus with a given index.

    Windows follow each other without a gap; the last token of a window is also the first of the next, so that each
    token of the corpus is a target once.

    Args:
        corpus: The text.
        sequence_length: Tokens per window, T.
        index: Which window.

    Returns:
        The window; arrays of shape [T].

    Example:
        >>> from zeco_jax.training import Corpus, Document, window
        >>> corpus = Corpus.from_documents([Document("a", b"xy"), Document("b", b"z")])
        >>> print(*(part.astype(int).tolist() for part in window(corpus, 4, 0)))
        [120, 121, 0, 122] [121, 0, 122, 0] [0, 0, 0, 1] [1, 1, 0, 1]
    """
    start = index * sequence_length
    stop = start + sequence_length + 1
    tokens = corpus.tokens[start:stop].astype(np.int32)
    documents = corpus.document_ids(start, stop)
    documents -= documents[0]
    return Batch(tokens[:-1], tokens[1:], documents[:-1], documents[1:] == documents[:-1])


def training_batches(corpus: Corpus, *, batch_size: int, sequence_length: int, seed: int) -> grain.MapDataset:
    """Endless shuffled batches with random access: item n is the batch of step n, whatever was read before.

    Args:
        corpus: The text to train on.
        batch_size: Windows per batch, B.
        sequence_length: Tokens per window, T.
        seed: Seed of the order; each pass over the corpus has an order of its own.

    Returns:
        A Grain data set of `Batch`es of numpy arrays.

    Raises:
        ValueError: The corpus is too short for one window.

    Example:
        >>> from zeco_jax.training import Corpus, Document, training_batches
        >>> corpus = Corpus.from_documents([Document("a", bytes(range(1, 100)))])
        >>> batches = training_batches(corpus, batch_size=2, sequence_length=8, seed=0)
        >>> batches[1000].inputs.shape
        (2, 8)
    """
    windows = _windows(corpus, sequence_length, "training").shuffle(seed=seed).repeat()
    return windows.map(functools.partial(window, corpus, sequence_length)).batch(batch_size)


def validation_batches(corpus: Corpus, *, batch_size: int, sequence_length: int, limit: int) -> list[Batch]:
    """The same few batches for every validation, from all over the held-out text.

    Args:
        corpus: The held-out text.
        batch_size: Windows per batch, B. A last, partial batch is filled up with windows that don't count.
        sequence_length: Tokens per window, T.
        limit: Largest number of batches.

    Returns:
        At least one and at most `limit` batches of numpy arrays.

    Raises:
        ValueError: The corpus is too short for one window.
    """
    indices = _windows(corpus, sequence_length, "validation").shuffle(seed=0)
    chosen = [int(indices[i]) for i in range(min(len(indices), limit * batch_size))]
    windows = [window(corpus, sequence_length, index) for index in chosen]
    filler = windows[0]._replace(mask=np.zeros(sequence_length, bool))
    windows += [filler] * (-len(windows) % batch_size)
    groups = [windows[first : first + batch_size] for first in range(0, len(windows), batch_size)]
    return [Batch(*(np.stack(parts) for parts in zip(*group, strict=True))) for group in groups]


def place(batch: Batch, mesh: Mesh, chunk_tokens: int | None = None) -> Batch:
    """Spreads a batch over a mesh: sequences along the axis "data", tokens along the axis "seq".

    Every process holds the same global batch and hands its own devices their parts.

    With `chunk_tokens` the sequences are cut into n chunks of N tokens first, and each chunk is cut over the ranks:
    rank p of P holds the p-th part, of N / P tokens, of every chunk. Chunk after chunk, and in a chunk rank after rank,
    the tokens keep their order.

    Args:
        batch: Global numpy arrays, [B, T].
        mesh: A mesh with the axes "data" and "seq".
        chunk_tokens: Tokens of a chunk, N, which divide T; None: the sequences stay whole.

    Returns:
        The batch as global, sharded arrays, [B, T] or [n, B, N].
    """
    cut = PartitionSpec("data", "seq")
    if chunk_tokens is not None:
        rows, cut = batch.inputs.shape[0], PartitionSpec(None, *cut)
        batch = Batch(*(part.reshape(rows, -1, chunk_tokens).swapaxes(0, 1) for part in batch))
    sharding = NamedSharding(mesh, cut)
    return Batch(*(jax.make_array_from_callback(part.shape, sharding, part.__getitem__) for part in batch))


def _windows(corpus: Corpus, sequence_length: int, split: str) -> grain.MapDataset:
    """The indices of all whole windows."""
    count = (corpus.tokens.size - 1) // sequence_length
    if count < 1:
        raise ValueError(
            f"data: the {split} split has {corpus.tokens.size} bytes, too few for one window; expected at least "
            f"sequence_length + 1 = {sequence_length + 1}"
        )
    return grain.MapDataset.range(count)
