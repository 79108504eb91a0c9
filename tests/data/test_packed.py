import pickle

import numpy as np
import pytest

from dsv3.data import packed
from dsv3.data.corpus import Document
from dsv3.data.packed import load_tokens, pack, save_tokens
from dsv3.errors import UserError


def test_documents_follow_each_other_each_ended_by_eos(tokenizer, write_text, monkeypatch):
    monkeypatch.setattr(packed, "_BATCH_CHARACTERS", 300)  # several batches
    texts = [write_text(lines) for lines in (3, 1, 7, 2, 5)]
    data = pack(tokenizer, (Document(text, "x") for text in texts))
    assert data.ids.tolist() == [token for text in texts for token in tokenizer.encode(text, eos=True)]
    assert data.ids.dtype == np.uint16
    assert data.documents == 5
    assert data.text_bytes == sum(len(text.encode()) for text in texts) == tokenizer.token_bytes[data.ids].sum()


def test_a_large_vocabulary_takes_four_bytes_an_id(tokenizer, write_text, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 65537)
    assert pack(tokenizer, [Document(write_text(1), "x")]).ids.dtype == np.uint32
    monkeypatch.setattr(tokenizer, "vocab_size", 65536)
    assert pack(tokenizer, [Document(write_text(1), "x")]).ids.dtype == np.uint16


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_ids_come_back_from_disk_mapped_and_read_only(tmp_path, seed, dtype):
    ids = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, 1000, dtype, endpoint=True)
    save_tokens(tmp_path / "x.npy", ids)
    loaded = load_tokens(tmp_path / "x.npy")
    assert isinstance(loaded, np.memmap) and not loaded.flags.writeable
    assert loaded.dtype == dtype and (loaded == ids).all()


def test_damaged_or_foreign_arrays_are_errors(tmp_path, seed):
    path = tmp_path / "x.npy"
    with pytest.raises(UserError, match=r"not a readable \.npy file"):
        load_tokens(path)
    save_tokens(path, np.arange(1000, dtype=np.uint16))
    whole = path.read_bytes()
    for broken in (b"", b"not an array", whole[:5], whole[:60], whole[:-1], pickle.dumps([1])):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"not a readable \.npy file"):
            load_tokens(path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"not a readable \.npy file"):
        load_tokens(path)
    for foreign in (np.zeros((2, 2), np.uint16), np.zeros(4, np.int64), np.zeros(4, np.float32)):
        np.save(path, foreign)
        with pytest.raises(UserError, match="expected one row of uint16 or uint32"):
            load_tokens(path)
