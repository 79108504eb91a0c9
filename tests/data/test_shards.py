import json
import pickle

import numpy as np
import pytest

from dsv3.data.shards import ShardWriter, check_shard, open_shard
from dsv3.data.split import Part
from dsv3.errors import UserError


@pytest.fixture
def documents(write_text, seed) -> list[tuple[Part, np.ndarray]]:
    draw = np.random.default_rng(seed)
    return [
        (Part(write_text(1), f'"{n}"\n', "train", n), draw.integers(0, 60000, draw.integers(1, 40)).astype(np.uint16))
        for n in range(30)
    ]


@pytest.fixture
def record(documents, tmp_path):
    writer = ShardWriter()
    for part, ids in documents:
        writer.add(part, ids)
    return writer.write(tmp_path, "source-3/train-00007")


def test_documents_come_back_mapped_and_read_only(documents, record, tmp_path):
    shard = open_shard(tmp_path, record)
    check_shard(tmp_path, record)
    assert isinstance(shard.ids, np.memmap) and not shard.ids.flags.writeable and shard.ids.dtype == np.uint16
    assert (shard.ids == np.concatenate([ids for _, ids in documents])).all()
    assert (record.tokens, record.documents) == (len(shard.ids), 30)
    assert record.text_bytes == sum(len(part.text.encode()) for part, _ in documents)


def test_the_index_says_where_tokens_came_from(documents, record, tmp_path, rng):
    shard = open_shard(tmp_path, record)
    of_token = [part.origin for part, ids in documents for _ in ids]
    for _ in range(50):
        start = rng.randrange(len(of_token))
        stop = rng.randint(start + 1, len(of_token))
        assert shard.origins(start, stop) == list(dict.fromkeys(of_token[start:stop]))


@pytest.mark.parametrize("ending", [".npy", ".index.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "one bit"])
def test_a_missing_or_changed_file_is_named(record, tmp_path, rng, ending, damage):
    path = tmp_path / f"source-3/train-00007{ending}"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(data[:-2])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    says = "is missing" if damage == "missing" else "has changed"
    with pytest.raises(UserError, match=rf"train-00007{ending}' {says}.*run the same `dsv3 data prepare` again"):
        check_shard(tmp_path, record)


def test_damaged_or_foreign_ids_are_errors(record, tmp_path):
    path = tmp_path / "source-3/train-00007.npy"
    whole = path.read_bytes()
    for broken in (b"", b"not an array", whole[:5], whole[:60], whole[:-1], pickle.dumps([1])):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="cannot read the token ids"):
            open_shard(tmp_path, record)
    np.save(path, np.array([{"a": 1}] * record.tokens, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot read the token ids"):
        open_shard(tmp_path, record)
    for shape, dtype in (((record.tokens, 1), "u2"), (record.tokens + 1, "u2"), (record.tokens, "i8")):
        np.save(path, np.zeros(shape, dtype))
        with pytest.raises(UserError, match=f"expected {record.tokens} ids"):
            open_shard(tmp_path, record)
    path.unlink()
    with pytest.raises(UserError, match="cannot read the token ids"):
        open_shard(tmp_path, record)


def test_an_index_is_json_lines(record, tmp_path):
    lines = (tmp_path / "source-3/train-00007.index.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"end": record.tokens, "origin": '"29"\n'} and len(lines) == 30
