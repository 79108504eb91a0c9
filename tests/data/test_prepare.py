import hashlib
import json
import shutil

import numpy as np
import pytest

from dsv3.data import prepare as prepare_module
from dsv3.data.corpus import read_corpus
from dsv3.data.prepare import load_prepared, prepare
from dsv3.errors import UserError


@pytest.fixture
def book(tmp_path, write_text):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{n}: {line}\n" for n, line in enumerate(write_text(500).splitlines())), "utf-8")
    return path


@pytest.fixture
def prepared(tmp_path, book, seed):
    return prepare(str(book), 400, tmp_path / "data", seed=seed)


def lines(prepared, side) -> list[str]:
    return prepared.tokenizer.decode(getattr(prepared, side).ids).splitlines()


def test_both_sides_together_are_the_corpus(prepared, book, tmp_path):
    train, held_out = lines(prepared, "train"), lines(prepared, "held_out")
    assert train and held_out and not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(book.read_text("utf-8").splitlines())
    assert prepared.train.text_bytes + prepared.held_out.text_bytes == book.stat().st_size
    for data in (prepared.train, prepared.held_out):
        assert (data.ids == prepared.tokenizer.eos_id).sum() == data.documents
        assert prepared.tokenizer.token_bytes[data.ids].sum() == data.text_bytes


def test_the_folder_describes_itself(prepared, tmp_path, book, seed):
    folder = tmp_path / "data"
    description = json.loads((folder / "data.json").read_text())
    assert description["corpus"] == str(book) and description["seed"] == seed
    for side in ("train", "held_out"):
        data, part = getattr(prepared, side), description[side]
        assert part["sha256"] == hashlib.sha256((folder / f"{side}.npy").read_bytes()).hexdigest()
        assert (part["tokens"], part["documents"], part["text_bytes"]) == (
            len(data.ids),
            data.documents,
            data.text_bytes,
        )


def test_loading_gives_what_preparing_gave(prepared, tmp_path, write_text):
    loaded = load_prepared(tmp_path / "data")
    assert loaded.corpus == prepared.corpus
    for side in ("train", "held_out"):
        assert isinstance(getattr(loaded, side).ids, np.memmap)
        assert (getattr(loaded, side).ids == getattr(prepared, side).ids).all()
        assert getattr(loaded, side).documents == getattr(prepared, side).documents
    text = write_text(3)
    assert loaded.tokenizer.encode(text) == prepared.tokenizer.encode(text)


def test_preparing_twice_gives_the_same_bytes(prepared, tmp_path, book, seed):
    prepare(str(book), 400, tmp_path / "again", seed=seed)
    for name in ("train.npy", "held_out.npy", "tokenizer/tokenizer.json", "data.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "data" / name).read_bytes()


def test_the_tokenizer_never_sees_held_out_text(tmp_path, write_text, seed, monkeypatch):
    seen: list[str] = []
    train = prepare_module.Tokenizer.train

    def watch(texts, vocab_size):
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(prepare_module.Tokenizer, "train", watch)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": write_text(3)}) + "\n" for _ in range(60)))
    prepared = prepare(str(tmp_path / "corpus.jsonl"), 300, tmp_path / "data", held_out=0.2, seed=seed)
    assert sorted(line for text in seen for line in text.splitlines()) == sorted(lines(prepared, "train"))


def test_a_large_corpus_is_sampled_evenly_for_the_tokenizer(tmp_path, write_text):
    (tmp_path / "a.txt").write_text(write_text(3000), "utf-8")
    (tmp_path / "b.txt").write_text(write_text(1000), "utf-8")
    documents = list(read_corpus(str(tmp_path)))
    total = sum(len(document.text) for document in documents)
    assert list(prepare_module._even_sample(documents, total)) == [document.text for document in documents]
    pieces = list(prepare_module._even_sample(documents, total // 4))
    assert sum(map(len, pieces)) == pytest.approx(total / 4, abs=8200)
    for document in documents:
        assert sum(len(p) for p in pieces if p in document.text) == pytest.approx(len(document.text) / 4, abs=8200)


@pytest.mark.parametrize("max_bytes", [5_000, 20_001])
def test_max_bytes_cuts_the_corpus_to_size(tmp_path, book, seed, max_bytes):
    prepared = prepare(str(book), 300, tmp_path / "data", seed=seed, max_bytes=max_bytes)
    used = prepared.train.text_bytes + prepared.held_out.text_bytes
    assert max_bytes - 3 <= used <= max_bytes  # a character of up to four bytes may not fit
    start = book.read_bytes()[:used].decode()
    assert sorted(lines(prepared, "train") + lines(prepared, "held_out")) == sorted(start.splitlines())


def test_the_standard_library_is_a_corpus(tmp_path, seed):
    messages: list[str] = []
    prepared = prepare("stdlib", 512, tmp_path, seed=seed, max_bytes=300_000, progress=messages.append)
    assert prepared.tokenizer.vocab_size == 512 and prepared.train.ids.max() < 512
    assert len(prepared.tokenizer.encode(" self")) == 1
    assert len(messages) == 4


def test_prepared_data_is_never_overwritten_but_leftovers_are(prepared, tmp_path, book, seed):
    folder = tmp_path / "data"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds prepared data"):
        prepare(str(book), 500, folder, seed=seed)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "data.json").unlink()  # as if the first call had been killed
    assert prepare(str(book), 300, folder, seed=seed).tokenizer.vocab_size == 300


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"vocab_size": 10}, "vocab_size is 10"),
        ({"corpus": "no/such/file"}, "there is no corpus"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, book, seed, settings, complaint):
    arguments = {"corpus": str(book), "vocab_size": 300, "folder": tmp_path / "data", "seed": seed} | settings
    with pytest.raises(UserError, match=complaint):
        prepare(**arguments)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["train.npy", "held_out.npy", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "one byte"])
def test_a_missing_or_changed_file_is_named(prepared, tmp_path, rng, name, damage):
    path = tmp_path / "data" / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(data[:-2])
    else:
        data[rng.randrange(len(data))] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name}' " + ("is missing" if damage == "missing" else "has changed")):
        load_prepared(tmp_path / "data")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"corpus": "x", "tokenizer": 5}', b"\xff"])
def test_a_damaged_description_is_an_error(prepared, tmp_path, content):
    (tmp_path / "data" / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.json' is damaged"):
        load_prepared(tmp_path / "data")


def test_an_unprepared_folder_is_an_error(prepared, tmp_path):
    with pytest.raises(UserError, match="holds no prepared data"):
        load_prepared(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "data", tmp_path / "moved")  # a folder may move
    assert (load_prepared(tmp_path / "moved").train.ids == prepared.train.ids).all()
