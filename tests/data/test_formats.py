import gzip
import json
import pathlib
import sys

import pytest

from dsv3.data.formats import Document, NotTextError, read_file
from dsv3.errors import UserError


def read(path: pathlib.Path) -> list[Document]:
    return list(read_file(path, path.name))


def compress(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    if ending == ".zst":
        return pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)
    return data


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_text_file_is_one_document_with_its_line_ends(tmp_path, write_text, ending):
    text = write_text(5) + "last\r\nno end"
    path = tmp_path / f"book.md{ending}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + text.encode(), ending))
    assert read(path) == [Document(text, path.name)]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_json_lines(tmp_path, write_text, ending):
    texts = [write_text(2), "a\u2028b\n", "", "\u00e9\U0001f600"]
    lines = [json.dumps({"text": texts[0], "id": 1}), "", json.dumps({"text": texts[1]}, ensure_ascii=False)]
    lines += [json.dumps({"text": texts[2]}), json.dumps({"text": texts[3]})]
    path = tmp_path / f"data.JSONL{ending}"
    path.write_bytes(compress("\n".join(lines).encode(), ending))
    assert read(path) == [
        Document(texts[0], f"{path.name}:1"),
        Document(texts[1], f"{path.name}:3"),
        Document(texts[3], f"{path.name}:5"),
    ]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_several_compressed_streams_in_one_file_are_read_to_the_end(tmp_path, write_text, ending):
    texts = [write_text(50) for _ in range(3)]
    (tmp_path / f"a.txt{ending}").write_bytes(b"".join(compress(text.encode(), ending) for text in texts))
    assert [document.text for document in read(tmp_path / f"a.txt{ending}")] == ["".join(texts)]


@pytest.mark.parametrize("inner", [".jsonl", ".txt"])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["short by one byte", "half", "not compressed"])
def test_a_damaged_compressed_file_is_named(tmp_path, write_text, inner, ending, damage):
    whole = "".join(json.dumps({"text": write_text(3)}) + "\n" for _ in range(500)).encode()
    data = compress(whole, ending)
    broken = {"short by one byte": data[:-1], "half": data[: len(data) // 2], "not compressed": whole}[damage]
    path = tmp_path / f"data{inner}{ending}"
    path.write_bytes(broken)
    with pytest.raises(UserError, match=rf"cannot read '.*data{inner}{ending}': .*; replace it if it is damaged"):
        read(path)


def test_a_flipped_byte_in_a_gzip_file_is_found(tmp_path, write_text, rng):
    data = bytearray(gzip.compress(write_text(200).encode()))
    data[rng.randrange(20, len(data) - 8)] ^= 1 << rng.randrange(8)
    (tmp_path / "a.txt.gz").write_bytes(data)
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl.zst", "data.txt.zst"])
def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"needs pyarrow; run: pip install 'dsv3\[data\]'"):
        read(tmp_path / name)


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
def test_broken_json_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=complaint) as caught:
        read(path)
    assert f"'{path}', line 3" in str(caught.value) and not isinstance(caught.value, NotTextError)


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


@pytest.mark.parametrize(
    ("data", "complaint"),
    [(b"text\x00more", "binary"), (b"caf\xe9 au lait", r"not UTF-8 text \(byte 3\)")],
)
def test_a_file_that_is_not_text_is_told_apart_from_a_damaged_one(tmp_path, data, complaint):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(NotTextError, match=complaint):
        read(tmp_path / "file")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.txt.zst"])
def test_a_file_that_has_vanished_is_named(tmp_path, name):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=f"cannot read '.*{name}'"):
        read(tmp_path / name)
