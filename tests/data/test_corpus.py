import json
import os
import pathlib
import sys

import pytest

from dsv3.data.corpus import Document, read_corpus
from dsv3.errors import UserError


def read(path: pathlib.Path) -> list[Document]:
    return list(read_corpus(str(path)))


def test_text_file_is_one_document_with_its_line_ends(tmp_path, write_text):
    text = write_text(5) + "last\r\nno end"
    (tmp_path / "book.md").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / "book.md") == [Document(text, "book.md")]


def test_folder_is_read_in_order_without_hidden_binary_and_empty_files(tmp_path):
    files = {
        "b.txt": b"two",
        "a/z.py": b"one",
        "c.jsonl": b'{"text": "three"}\n',
        "picture.png": b"\x89PNG\x00\x00",
        "latin.txt": "é".encode("latin-1"),
        "late_nul.txt": b"x" * 10_000 + b"\x00",
        "empty.txt": b"",
        ".hidden": b"no",
        ".git/config": b"no",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    messages: list[str] = []
    documents = list(read_corpus(str(tmp_path), messages.append))
    assert documents == [Document("one", "a/z.py"), Document("two", "b.txt"), Document("three", "c.jsonl:1")]
    assert len(messages) == 1 and "passed over 3 files" in messages[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_folder_does_not_wait_for_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("here")
    assert [document.text for document in read(tmp_path)] == ["here"]


def test_json_lines(tmp_path, write_text):
    texts = [write_text(2), "a\u2028b\n", "", "\u00e9\U0001f600"]
    lines = [json.dumps({"text": texts[0], "id": 1}), "", json.dumps({"text": texts[1]}, ensure_ascii=False)]
    lines += [json.dumps({"text": texts[2]}), json.dumps({"text": texts[3]})]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read(tmp_path / "data.jsonl") == [
        Document(texts[0], "data.jsonl:1"),
        Document(texts[1], "data.jsonl:3"),
        Document(texts[3], "data.jsonl:5"),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "x"', "not valid JSON"),
        (b'{"txt": "x"}', "field 'text'"),
        (b'["text"]', "field 'text'"),
        (b'{"text": 7}', "'text' is int, expected a string"),
        (b'{"text": null}', "'text' is NoneType, expected a string"),
        (b'{"text": "\xff"}', "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_broken_json_line_is_named(tmp_path, line, complaint, in_folder):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=complaint) as caught:
        read(tmp_path if in_folder else path)
    assert f"'{path}', line 3" in str(caught.value)


def test_parquet(tmp_path, write_text):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [write_text(1), "", write_text(1)]
    for kind in (pyarrow.string(), pyarrow.large_string()):
        table = pyarrow.table({"id": [1, 2, 3], "text": pyarrow.array(texts, kind)})
        parquet.write_table(table, tmp_path / "data.parquet", row_group_size=2)
        assert read(tmp_path / "data.parquet") == [
            Document(texts[0], "data.parquet:1"),
            Document(texts[2], "data.parquet:3"),
        ]


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"body": ["x"]}, "no column 'text'; it has body"),
        ({"text": ["x", None]}, "row 2: 'text' is NoneType"),
        ({"text": [1]}, "row 1: 'text' is int"),
    ],
)
def test_wrong_parquet_is_explained(tmp_path, columns, complaint):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    with pytest.raises(UserError, match=complaint):
        read(tmp_path / "data.parquet")


def test_damaged_parquet_is_an_error(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(tmp_path / "data.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'dsv3\[data\]'"):
        read(tmp_path / "data.parquet")


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b"\n\n", "is empty"),
        ("nul.txt", b"text\x00more", "binary"),
        ("latin.txt", b"caf\xe9 au lait", r"not UTF-8 text \(byte 3\)"),
    ],
)
def test_a_file_without_text_is_an_error(tmp_path, name, data, complaint):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=complaint):
        read(tmp_path / name)


def test_a_folder_without_text_is_an_error(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"\x00\x01")
    with pytest.raises(UserError, match="holds no text"):
        read(tmp_path)


@pytest.mark.parametrize("spec", ["missing.txt", "~no-such-user/text", "bad\0name", ""])
def test_a_missing_corpus_is_an_error(spec):
    with pytest.raises(UserError, match="there is no corpus"):
        read_corpus(spec)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.txt").write_text("my text")
    assert [document.text for document in read_corpus("~/mine.txt")] == ["my text"]


def test_stdlib_is_source_without_tests_packages_and_tables():
    documents = list(read_corpus("stdlib"))
    sources = [document.source for document in documents]
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py"} <= set(sources)
    assert sources == sorted(sources) and len(set(sources)) == len(sources)
    unwanted = {"site-packages", "test", "tests", "encodings", "pydoc_data", "idle_test"}
    assert not any(unwanted & set(source.split("/")) or "_sysconfigdata" in source for source in sources)
    assert "class ArgumentParser" in documents[sources.index("stdlib/argparse.py")].text


def test_a_python_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no sources of its standard library"):
        read_corpus("stdlib")
