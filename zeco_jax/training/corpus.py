"""Text files as byte-level documents: read in a fixed order, held out by file, joined to one stream."""

import functools
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

SEPARATOR = 0
"""The byte that ends every document; a file that contains it is no text."""

_NOT_LIBRARY_SOURCE = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


class Document(NamedTuple):
    """One text file.

    Attributes:
        name: Path below the data directory, with forward slashes.
        content: The file's bytes.
    """

    name: str
    content: bytes


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents joined to one stream of bytes, each ended by the separator byte 0.

    Attributes:
        tokens: The stream, [N] uint8.
        starts: Position of each document's first byte in the stream, [D] int64, ascending.
    """

    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def from_documents(cls, documents: Sequence[Document]) -> "Corpus":
        """Joins documents in the order given.

        Args:
            documents: The documents, at least one.

        Returns:
            The stream and where each document starts in it.

        Example:
            >>> from zeco_jax.training import Corpus, Document
            >>> corpus = Corpus.from_documents([Document("a", b"xy"), Document("b", b"z")])
            >>> corpus.tokens.tolist(), corpus.starts.tolist()
            ([120, 121, 0, 122, 0], [0, 3])
        """
        pieces = [document.content + bytes([SEPARATOR]) for document in documents]
        starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])], dtype=np.int64)
        return cls(np.frombuffer(b"".join(pieces), dtype=np.uint8), starts)

    @functools.cached_property
    def checksum(self) -> int:
        """CRC-32 of the stream: two corpora with one checksum give the same batches."""
        return zlib.crc32(self.tokens)

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """Index of the document that each position lies in.

        Args:
            start: First position of the stream.
            stop: Position after the last.

        Returns:
            [stop - start] int32.
        """
        return (np.searchsorted(self.starts, np.arange(start, stop), side="right") - 1).astype(np.int32)


def read_documents(directory: Path | None = None) -> list[Document]:
    """Reads the text files of a directory, in the order of their names.

    Files that are empty, not UTF-8 or contain a zero byte are passed over, as are hidden files and directories. All
    text is held in memory.

    Args:
        directory: The directory, read recursively. None: the source of Python's standard library (its `.py` files
            without its tests), which every installation has.

    Returns:
        One document per file.

    Raises:
        ValueError: The directory doesn't exist, cannot be read or holds no text file.
    """
    root = Path(sysconfig.get_path("stdlib")) if directory is None else Path(directory)
    if not root.is_dir():
        raise ValueError(f"data.directory: got {str(root)!r}, which is no directory; expected one with text files")
    try:
        paths = sorted(_library_files(root) if directory is None else _files(root))
        documents = [document for path in paths if (document := _read_text(path, root)) is not None]
    except OSError as error:
        raise ValueError(f"data.directory: {error.filename!r} in {str(root)!r} cannot be read: {error}") from error
    if not documents:
        raise ValueError(
            f"data.directory: {str(root)!r} has no text file among {len(paths)} files; expected at least one that is "
            "not empty, is UTF-8 and has no zero byte"
        )
    return documents


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Holds whole files out of training, the same ones on every machine.

    Files are taken in the order of a hash of their names until they make up the share asked for. A single file is cut
    instead: its end is held out.

    Args:
        documents: All documents, at least one.
        fraction: Share of the bytes to hold out, in (0, 1).

    Returns:
        The documents to train on and those held out, neither of them empty, each in its given order.
    """
    if len(documents) == 1:
        name, content = documents[0]
        cut = len(content) - round(fraction * len(content))
        return [Document(name, content[:cut])], [Document(name, content[cut:])]
    wanted = fraction * sum(len(document.content) for document in documents)
    by_hash = sorted(documents, key=lambda document: (zlib.crc32(document.name.encode()), document.name))
    held_out: set[str] = set()
    taken = 0
    for document in by_hash[:-1]:
        if taken >= wanted:
            break
        held_out.add(document.name)
        taken += len(document.content)
    training = [document for document in documents if document.name not in held_out]
    return training, [document for document in documents if document.name in held_out]


def _files(root: Path, skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files below `root`, without hidden ones and without folders named in `skip`."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skip]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _library_files(root: Path) -> Iterator[Path]:
    """The `.py` files of the standard library, without installed packages and tests."""
    return (path for path in _files(root, _NOT_LIBRARY_SOURCE) if path.suffix == ".py")


def _read_text(path: Path, root: Path) -> Document | None:
    """The file as a document, or None if it is no text."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if not content or SEPARATOR in content:
        return None
    return Document(path.relative_to(root).as_posix(), content)
