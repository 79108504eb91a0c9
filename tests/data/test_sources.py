import json
import os
import pathlib
import sys
import types
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsv3.data.formats import Document
from dsv3.data.sources import Source, first_bytes, parse_sources, read_source
from dsv3.errors import UserError

weights = st.decimals(min_value="0.001", max_value=1000, places=3)
names = st.sampled_from(["a", "my folder/*.txt", "hf:name/set:part", "C:/text", "x 3", "stdlib", "~/é.jsonl.gz"])


def read(path: pathlib.Path) -> list[Document]:
    return list(read_source(str(path)))


@given(sources=st.dictionaries(names, weights, min_size=1))
def test_weights_and_names_come_apart_exactly(sources):
    spec = "  ".join(f"{weight}:{name}" for name, weight in sources.items())
    total = sum(map(Fraction, sources.values()))
    assert parse_sources(spec) == [Source(name, Fraction(weight) / total) for name, weight in sources.items()]


@pytest.mark.parametrize("name", ["a b", "stdlib", "hf:x", "C:\\text", "a:b", "1", " 0,5:x"])
def test_a_single_source_needs_no_weight(name):
    assert parse_sources(name) == [Source(name.strip(), Fraction(1))]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("a 0.5:b", "gives a weight to some sources only"),
        ("0.5:a 0:b", "source 'b' has weight 0"),
        ("0.5: 0.5:b", "empty name"),
        ("1:", "empty name"),
        (" ", "empty name"),
        ("1:a 2:b 1:a", "source 'a' is given twice"),
    ],
)
def test_a_malformed_spec_is_explained(spec, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_sources(spec)


FILES = {
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


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    for name, data in FILES.items():
        path = tmp_path / "[my] texts" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(data)
    return tmp_path / "[my] texts"


def test_folder_is_read_in_order_without_hidden_binary_and_empty_files(folder):
    messages: list[str] = []
    documents = list(read_source(str(folder), messages.append))
    assert documents == [Document("one", "a/z.py"), Document("two", "b.txt"), Document("three", "c.jsonl:1")]
    assert len(messages) == 1 and "passed over 3 files" in messages[0]


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("*.txt", ["two"]),
        ("**/*.py", ["one"]),
        ("?.*", ["two", "three"]),
        ("*", ["one", "two", "three"]),
        ("[a-b]*", ["one", "two"]),
        ("**", ["one", "two", "three"]),  # each file once, though its folder matches too
    ],
)
def test_a_pattern_reads_the_files_and_folders_that_match(folder, pattern, texts):
    documents = read(folder.with_name("*texts") / pattern)
    assert [document.text for document in documents] == texts
    assert all(pathlib.Path(document.origin.removesuffix(":1")).is_file() for document in documents)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_folder_does_not_wait_for_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("here")
    assert [document.text for document in read(tmp_path)] == ["here"]


@pytest.mark.parametrize("name", ["broken.jsonl", "broken.txt.gz", "broken.parquet"])
def test_a_broken_file_of_a_folder_is_not_passed_over(folder, name):
    pytest.importorskip("pyarrow")
    (folder / name).write_bytes(b'{"text": \n')
    for spec in (folder, folder.with_name("*texts") / "*"):
        with pytest.raises(UserError, match=name):
            read(spec)


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
    for spec in (tmp_path, tmp_path / "*"):
        (tmp_path / "data.bin").write_bytes(b"\x00\x01")
        with pytest.raises(UserError, match="holds no text"):
            read(spec)
    (tmp_path / "data.bin").unlink()
    with pytest.raises(UserError, match="holds no text"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["missing.txt", "no/*.match", "~no-such-user/text", "bad\0name", "", "x" * 5000])
def test_a_missing_source_is_an_error(name):
    with pytest.raises(UserError, match="there is no source"):
        read_source(name)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.txt").write_text("my text")
    for name in ("~/mine.txt", "~/m*"):
        assert [document.text for document in read_source(name)] == ["my text"]


def test_stdlib_is_source_without_tests_packages_and_tables():
    documents = list(read_source("stdlib"))
    origins = [document.origin for document in documents]
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py"} <= set(origins)
    assert origins == sorted(origins) and len(set(origins)) == len(origins)
    unwanted = {"site-packages", "test", "tests", "encodings", "pydoc_data", "idle_test"}
    assert not any(unwanted & set(origin.split("/")) or "_sysconfigdata" in origin for origin in origins)
    assert "class ArgumentParser" in documents[origins.index("stdlib/argparse.py")].text


def test_a_python_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no sources of its standard library"):
        read_source("stdlib")


@pytest.mark.parametrize("max_bytes", [1, 7, 8, 9, 10, 1000, None])
def test_first_bytes_cuts_to_size_between_characters(max_bytes):
    documents = [Document("abéé", "1"), Document("中文", "2"), Document("end", "3")]
    kept = list(first_bytes(documents, max_bytes))
    data = "".join(document.text for document in kept).encode()
    whole = "".join(document.text for document in documents).encode()
    assert whole.startswith(data) and all(document.text for document in kept)
    size = len(whole) if max_bytes is None else min(max_bytes, len(whole))
    assert size - 3 < len(data) <= size


class TestHuggingFace:
    """With a stand-in for the library, which would want a network."""

    @pytest.fixture
    def load(self, monkeypatch):
        """Sets what `datasets.load_dataset` does."""

        def use(function):
            monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=function))

        return use

    def test_rows_of_the_training_split_are_streamed(self, load, write_text):
        texts = [write_text(1), "", write_text(2)]
        asked = []

        def rows(*args, **options):
            asked.append((args, options))
            yield from ({"id": 0, "text": text} for text in texts)
            raise AssertionError("read on, though nobody asked for it")

        load(rows)
        documents = read_source("hf:org/name:part")
        assert next(documents) == Document(texts[0], "org/name:part:1")
        assert next(documents) == Document(texts[2], "org/name:part:3")
        assert asked == [(("org/name", "part"), {"split": "train", "streaming": True})]

    @pytest.mark.parametrize(
        ("rows", "complaint"),
        [
            ([], "is empty"),
            ([{"body": "x", "id": 3}], "no column 'text'; it has body, id"),
            ([{"text": "x"}, {"text": 5}], "dataset 'name', row 2: 'text' is int"),
        ],
    )
    def test_wrong_columns_are_explained(self, load, rows, complaint):
        load(lambda *args, **options: rows)
        with pytest.raises(UserError, match=complaint):
            list(read_source("hf:name"))

    def test_whatever_the_library_raises_is_one_sentence(self, load):
        def fail(*args, **options):
            raise ConnectionError("no route to host")

        load(fail)
        with pytest.raises(UserError, match="cannot read the dataset 'name' from the Hugging Face Hub: no route"):
            read_source("hf:name")

    def test_without_the_library_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"pip install 'dsv3\[data\]'"):
            read_source("hf:name")


def test_a_hugging_face_dataset_in_a_local_folder_is_read_by_the_real_library(tmp_path, write_text, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    texts = [write_text(2) for _ in range(5)]
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert [document.text for document in read_source(f"hf:{tmp_path / 'set'}")] == texts
    with pytest.raises(UserError, match="from the Hugging Face Hub"):
        read_source(f"hf:{tmp_path / 'nothing'}")
