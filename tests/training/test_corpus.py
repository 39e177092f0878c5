import numpy as np
import pytest

from zeco_jax.training import Corpus, Document, read_documents, split_documents


def test_text_files_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "sub" / "c.txt").write_text("thïrd")
    assert read_documents(tmp_path) == [
        Document("a.md", b"first"),
        Document("b.txt", b"second"),
        Document("sub/c.txt", "thïrd".encode()),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("latin.txt", b"caf\xe9", id="not-utf-8"),
        pytest.param("binary.txt", b"a\0b", id="zero-byte"),
        pytest.param("empty.txt", b"", id="empty"),
        pytest.param(".hidden", b"text", id="hidden"),
    ],
)
def test_what_is_no_text_is_passed_over(tmp_path, name, content):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / name).write_bytes(content)
    assert [document.name for document in read_documents(tmp_path)] == ["good.txt"]


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data.directory.*nowhere"):
        read_documents(tmp_path / "nowhere")


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match=r"data.directory.*no directory"):
        read_documents(tmp_path / "file")


def test_a_directory_without_text_is_named(tmp_path):
    (tmp_path / "image").write_bytes(b"\0\1")
    with pytest.raises(ValueError, match=r"data.directory.*no text file among 1 files"):
        read_documents(tmp_path)


def test_a_directory_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path, onerror):
        onerror(PermissionError(13, "Permission denied", str(path)))
        return iter(())

    monkeypatch.setattr("zeco_jax.training.corpus.os.walk", refuse)
    with pytest.raises(ValueError, match=r"data.directory.*Permission denied"):
        read_documents(tmp_path)


def test_the_default_is_the_standard_library():
    names = {document.name for document in read_documents()}
    assert "textwrap.py" in names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)


def test_files_are_held_out_whole():
    documents = [Document(f"file-{number}", bytes([65 + number]) * 100) for number in range(20)]
    training, held_out = split_documents(documents, 0.2)
    assert len(held_out) == 4
    assert sorted(training + held_out) == sorted(documents)


def test_one_file_among_two_is_held_out():
    training, held_out = split_documents([Document("a", b"x" * 10), Document("b", b"y" * 1000)], 0.01)
    assert len(training) == len(held_out) == 1


def test_a_single_file_is_cut_at_its_end():
    training, held_out = split_documents([Document("a", b"0123456789")], 0.2)
    assert (training[0].content, held_out[0].content) == (b"01234567", b"89")


def test_documents_end_with_the_separator():
    corpus = Corpus.from_documents([Document("a", b"xy"), Document("b", b"z")])
    np.testing.assert_array_equal(corpus.document_ids(0, 5), [0, 0, 0, 1, 1])
    assert corpus.tokens.tobytes() == b"xy\0z\0"
