import json
import shutil

import numpy as np
import pytest

from dsv3.data.config import DataConfig
from dsv3.data.manifest import is_prepared
from dsv3.data.prepare import prepare
from dsv3.data.prepared import describe, load_prepared
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError


@pytest.fixture
def texts(write_text) -> list[str]:
    return [write_text(2) for _ in range(100)]


@pytest.fixture
def data(tmp_path, texts, seed):
    for name, part in (("a", texts[:60]), ("b", texts[60:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    spec = f"2:{tmp_path / 'a.jsonl'} 1:{tmp_path / 'b.jsonl'}"
    return prepare(spec, tmp_path / "data", 350, DataConfig(seed=seed, shard_tokens=1000, held_out=0.2))


def test_loading_gives_what_preparing_gave(data, tmp_path, texts):
    shutil.copytree(tmp_path / "data", tmp_path / "moved")  # a folder may move
    loaded = load_prepared(tmp_path / "moved")
    assert [(s.name, s.share) for s in loaded.sources] == [(s.name, s.share) for s in data.sources]
    for ours, theirs in zip(loaded.sources, data.sources, strict=True):
        for side in ("train", "held_out"):
            assert len(getattr(ours, side)) > 0
            for one, other in zip(getattr(ours, side), getattr(theirs, side), strict=True):
                assert isinstance(one.ids, np.memmap) and (one.ids == other.ids).all()
    assert loaded.tokenizer.encode(texts[0]) == data.tokenizer.encode(texts[0])


def test_a_description_counts_everything(data, tmp_path, texts, seed):
    report = json.loads(json.dumps(describe(tmp_path / "data")))
    assert report["complete"] and report["settings"]["seed"] == seed
    assert report["tokenizer"] == data.tokenizer.fingerprint
    eos = data.tokenizer.eos_id
    for source, described, part in zip(data.sources, report["sources"], (texts[:60], texts[60:]), strict=True):
        assert described["name"] == source.name and described["share"] == pytest.approx(len(part) / 60 / 3 * 2, abs=0.2)
        assert described["documents"] == len(part)
        assert described["text_bytes"] == sum(len(text.encode()) for text in part)
        for side in ("train", "held_out"):
            shards = getattr(source, side)
            ids = np.concatenate([shard.ids for shard in shards])
            assert described[side] == {
                "shards": len(shards),
                "tokens": len(ids),
                "documents": (ids == eos).sum(),
                "text_bytes": data.tokenizer.token_bytes[ids].sum(),
            }


def test_corruption_is_found_unless_one_asks_not_to_look(data, tmp_path):
    path = data.sources[1].train[0].path.with_suffix(".npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name}' has changed"):
        load_prepared(tmp_path / "data")
    assert load_prepared(tmp_path / "data", verify=False).sources
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match="cannot read the token ids"):
        load_prepared(tmp_path / "data", verify=False)


def test_a_tokenizer_other_than_the_datas_is_refused(data, tmp_path):
    assert load_prepared(tmp_path / "data", tokenizer=Tokenizer.load(tmp_path / "data" / "tokenizer")).sources
    with pytest.raises(UserError, match=r"encoded with another tokenizer .* than the model's"):
        load_prepared(tmp_path / "data", tokenizer=Tokenizer.train(["other"], 300))


def test_a_changed_tokenizer_is_an_error(data, tmp_path):
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json' is missing"):
        load_prepared(tmp_path / "data", verify=False)
    Tokenizer.train(["other"], 300).save(tmp_path / "data" / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer\.json' has changed"):
        load_prepared(tmp_path / "data", verify=False)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"format": 1, "settings": 5}', b"\xff", b'{"format": 1, "sources": [{}]}']
)
@pytest.mark.parametrize("use", [load_prepared, describe])
def test_a_damaged_manifest_is_an_error(data, tmp_path, content, use):
    (tmp_path / "data" / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json' is damaged"):
        use(tmp_path / "data")


def test_a_manifest_of_another_format_is_an_error(data, tmp_path):
    path = tmp_path / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="has format 99, expected 1"):
        describe(tmp_path / "data")


@pytest.mark.parametrize("name", ["elsewhere", "bad\0name", "x" * 5000])
def test_a_folder_without_prepared_data_is_an_error(tmp_path, name):
    assert not is_prepared(tmp_path / name)
    with pytest.raises(UserError, match="holds no prepared data"):
        load_prepared(tmp_path / name)
