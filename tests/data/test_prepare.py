import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from dsv3 import files
from dsv3.data import prepare as prepare_module
from dsv3.data.config import DataConfig
from dsv3.data.manifest import read_manifest
from dsv3.data.prepare import prepare
from dsv3.data.prepared import PreparedData, PreparedSource, load_prepared
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from tests.data.conftest import text_writer


@pytest.fixture
def book(tmp_path, write_text) -> pathlib.Path:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{n}: {line}\n" for n, line in enumerate(write_text(500).splitlines())), "utf-8")
    return path


@pytest.fixture
def texts(write_text) -> list[str]:
    return [f"{number}: {write_text(1 + number % 5)}" for number in range(150)]


@pytest.fixture
def records(tmp_path, texts) -> pathlib.Path:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Until the disk has what it was given: no test of these pulls the plug."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)


def plain(seed: int, **changes) -> DataConfig:
    """Neither FIM nor splitting: what is encoded can be read again as it was."""
    return DataConfig(**{"seed": seed, "fim_rate": 0.0, "split_rate": 0.0, **changes})


def texts_of(data: PreparedData, source: PreparedSource, side: str) -> list[str]:
    """The documents of a side."""
    found = []
    for shard in getattr(source, side):
        ends = np.flatnonzero(shard.ids == data.tokenizer.eos_id)
        assert ends[-1] == len(shard.ids) - 1, "a document is cut by the end of a shard"
        found += [data.tokenizer.decode(ids) for ids in np.split(shard.ids, ends + 1)[:-1]]
    return found


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_sides_together_are_the_source(tmp_path, records, texts, seed):
    data = prepare(str(records), tmp_path / "data", 400, plain(seed, held_out=0.2))
    (source,) = data.sources
    train, held_out = (texts_of(data, source, side) for side in ("train", "held_out"))
    assert not set(train) & set(held_out) and 10 < len(held_out) < 55
    assert [text for text in texts if text not in held_out] == train
    assert [text for text in texts if text in held_out] == held_out


def test_one_book_is_divided_by_lines(tmp_path, book, seed):
    data = prepare(str(book), tmp_path / "data", 400, plain(seed))
    train, held_out = ("".join(texts_of(data, data.sources[0], side)).splitlines() for side in ("train", "held_out"))
    assert train and held_out
    assert sorted(train + held_out) == sorted(book.read_text("utf-8").splitlines())


def test_fim_and_splitting_touch_the_training_side_alone(tmp_path, records, seed):
    config = DataConfig(seed=seed, fim_rate=0.5, split_rate=0.5, held_out=0.3)
    data = prepare(str(records), tmp_path / "data", 400, config)
    reference = prepare(str(records), tmp_path / "plain", 400, plain(seed, held_out=0.3))
    ids, plain_ids = (
        {side: getattr(each.sources[0], side)[0].ids for side in ("train", "held_out")} for each in (data, reference)
    )
    assert (ids["held_out"] == plain_ids["held_out"]).all()
    documents = (plain_ids["train"] == reference.tokenizer.eos_id).sum()
    changed = (ids["train"] == data.tokenizer.special_id("<｜fim▁begin｜>")).sum()
    assert 0.3 < changed / documents < 0.7
    bytes_ = [data.tokenizer.token_bytes[each["train"]].sum() for each in (ids, plain_ids)]
    assert bytes_[0] == bytes_[1]


def test_shards_are_whole_documents_of_about_the_size(tmp_path, records, seed):
    data = prepare(str(records), tmp_path / "data", 400, plain(seed, shard_tokens=1000))
    whole = prepare(str(records), tmp_path / "whole", 400, plain(seed))
    for side in ("train", "held_out"):
        shards, (one,) = getattr(data.sources[0], side), getattr(whole.sources[0], side)
        assert (np.concatenate([shard.ids for shard in shards]) == one.ids).all()
        assert texts_of(data, data.sources[0], side) == texts_of(whole, whole.sources[0], side)
    units = read_manifest(tmp_path / "data").sources[0].units
    sizes = [sum(shard.tokens for shard in unit.shards.values()) for unit in units]
    assert len(sizes) > 5 and min(sizes[:-1]) >= 1000 and max(sizes) < 3000


def test_preparing_twice_gives_the_same_bytes(tmp_path, records, seed):
    for name in ("one", "two"):
        prepare(str(records), tmp_path / name, 400, DataConfig(seed=seed, shard_tokens=2000))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_number_of_threads_changes_nothing(tmp_path, records, seed):
    """The tokenizers library takes as many as it is told, once in a process."""
    code = "import sys; from pathlib import Path; from dsv3.data.prepare import *;"
    code += "prepare(sys.argv[1], Path(sys.argv[2]), 400, DataConfig(seed=int(sys.argv[3]), shard_tokens=2000))"
    for threads in ("1", "3"):
        command = [sys.executable, "-c", code, str(records), str(tmp_path / threads), str(seed)]
        subprocess.run(command, check=True, env=os.environ | {"RAYON_NUM_THREADS": threads})
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_several_sources_keep_their_names_and_shares(tmp_path, book, records, texts, seed):
    data = prepare(f"0.7:{records} 0.3:{book}", tmp_path / "data", 400, plain(seed))
    assert [(source.name, float(source.share)) for source in data.sources] == [(str(records), 0.7), (str(book), 0.3)]
    assert sorted(
        itertools.chain(*(texts_of(data, data.sources[0], side) for side in ("train", "held_out")))
    ) == sorted(texts)
    assert texts_of(data, data.sources[1], "held_out")


def test_no_held_out_text_of_one_source_is_trained_on_in_another(tmp_path, texts, seed):
    for name, part in (("a.jsonl", texts[:100]), ("b.jsonl", texts[50:])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    data = prepare(
        f"1:{tmp_path / 'a.jsonl'} 1:{tmp_path / 'b.jsonl'}", tmp_path / "data", 400, plain(seed, held_out=0.3)
    )
    train, held_out = (
        set(itertools.chain(*(texts_of(data, source, side) for source in data.sources)))
        for side in ("train", "held_out")
    )
    assert train | held_out == set(texts) and not train & held_out


def test_the_tokenizer_never_sees_held_out_text(tmp_path, records, seed, monkeypatch):
    seen: list[str] = []
    train = Tokenizer.train

    def watch(texts, vocab_size):
        seen.extend(texts)
        return train(seen, vocab_size)

    monkeypatch.setattr(prepare_module.Tokenizer, "train", watch)
    data = prepare(str(records), tmp_path / "data", 400, plain(seed, held_out=0.3))
    assert seen == texts_of(data, data.sources[0], "train")


def test_the_tokenizer_sees_sources_in_their_shares(tmp_path, write_text, seed, monkeypatch):
    seen: list[str] = []
    tokenizer = Tokenizer.train(["x"], 300)
    monkeypatch.setattr(prepare_module, "_TOKENIZER_CHARACTERS", 20_000)
    monkeypatch.setattr(prepare_module.Tokenizer, "train", lambda texts, size: seen.extend(texts) or tokenizer)
    for mark in "ab":
        lines = [json.dumps({"text": f"{mark}{number} {write_text(1)}"}) for number in range(2000)]
        (tmp_path / f"{mark}.jsonl").write_text("\n".join(lines))
    prepare(f"3:{tmp_path / 'a.jsonl'} 1:{tmp_path / 'b.jsonl'}", tmp_path / "data", 300, plain(seed))
    sizes = {mark: sum(len(text) for text in seen if text.startswith(mark)) for mark in "ab"}
    assert sizes["a"] == pytest.approx(15_000, rel=0.02) and sizes["b"] == pytest.approx(5_000, rel=0.02)


def test_an_existing_tokenizer_is_taken_as_it_is(tmp_path, records, texts, tokenizer, seed):
    data = prepare(str(records), tmp_path / "data", tokenizer, plain(seed))
    assert data.tokenizer.fingerprint == tokenizer.fingerprint
    first = texts_of(data, data.sources[0], "train")[0]
    ids = tokenizer.encode(first, eos=True)
    assert data.sources[0].train[0].ids[: len(ids)].tolist() == ids


@pytest.mark.parametrize("max_bytes", [5_000, 20_001])
def test_max_bytes_cuts_each_source_to_size(tmp_path, book, seed, max_bytes):
    other = shutil.copy(book, tmp_path / "other.txt")
    data = prepare(f"1:{book} 1:{other}", tmp_path / "data", 300, plain(seed, max_bytes=max_bytes))
    for source in data.sources:
        lines = [
            line for side in ("train", "held_out") for text in texts_of(data, source, side) for line in text.split("\n")
        ]
        used = "".join(sorted(lines))
        start = book.read_bytes()[:max_bytes].decode(errors="ignore")
        assert used == "".join(sorted(start.split("\n")))


def test_the_standard_library_is_a_source(tmp_path, seed):
    messages: list[str] = []
    config = DataConfig(seed=seed, max_bytes=300_000)
    data = prepare("stdlib", tmp_path, 512, config, report=messages.append)
    assert data.tokenizer.vocab_size == 512 and max(shard.ids.max() for shard in data.sources[0].train) < 512
    assert len(data.tokenizer.encode(" self")) == 1
    assert len(messages) == 3


def test_progress_ends_at_the_whole(tmp_path, records, texts, seed):
    seen = []
    data = prepare(str(records), tmp_path / "data", 400, plain(seed, shard_tokens=1000), advance=seen.append)
    size = sum(len(text.encode()) for text in texts)
    stages = [stage for stage, _ in itertools.groupby(seen, lambda progress: progress.stage)]
    assert stages == [f"reading '{records}'", f"encoding '{records}'"]
    assert seen[-1].text_bytes == seen[-1].total_bytes == size
    assert seen[-1].tokens == sum(len(s.ids) for side in ("train", "held_out") for s in getattr(data.sources[0], side))
    assert [progress.text_bytes for progress in seen[1:]] == sorted(progress.text_bytes for progress in seen[1:])


class Stop(BaseException):
    """Stands for whatever may end a process."""


@dataclass(frozen=True)
class Job:
    """Two sources, the settings that divide them into many shards, and what comes of it undisturbed."""

    spec: str
    records: pathlib.Path
    config: DataConfig
    reference: pathlib.Path

    def run(self, folder: pathlib.Path, **callbacks) -> PreparedData:
        return prepare(self.spec, folder, 400, self.config, **callbacks)

    def interrupt(self, folder: pathlib.Path, after: int, failure: BaseException) -> None:
        """Prepare until `after` files are put in place; the next one raises `failure`."""
        put, replace = itertools.count(), os.replace

        def fail(source, target):
            if next(put) == after:
                raise failure
            replace(source, target)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(type(failure), UserError):
            patch.setattr(files.os, "replace", fail)
            self.run(folder)
            pytest.fail("it was not interrupted")


@pytest.fixture(scope="module")
def job(tmp_path_factory, request) -> Job:
    folder, seed = tmp_path_factory.mktemp("job"), request.config.getoption("--seed")
    write_text = text_writer(random.Random(seed))
    (folder / "book.txt").write_text(write_text(300), "utf-8")
    lines = [json.dumps({"text": f"{number}: {write_text(1 + number % 5)}"}) + "\n" for number in range(150)]
    records = folder / "records.jsonl"
    records.write_text("".join(lines))
    config = DataConfig(seed=seed, shard_tokens=1500)
    job = Job(f"1:{records} 2:{folder / 'book.txt'}", records, config, folder / "reference")
    job.run(job.reference)
    assert len(list(job.reference.rglob("*.npy"))) > 8
    return job


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return tmp_path / "data"


@pytest.mark.parametrize("after", [0, 2, 3, 4, 5, 8, 15])  # tokenizer, its settings, manifest, ids, index, ids, ...
@pytest.mark.parametrize("failure", [Stop(), OSError(28, "No space left on device")])
def test_an_interrupted_preparation_goes_on_to_the_same_bytes(job, folder, after, failure):
    job.interrupt(folder, after, failure)
    if (folder / "manifest.json").exists():
        with pytest.raises(UserError, match="not complete; run the same `dsv3 data prepare` again"):
            load_prepared(folder)
    job.run(folder)
    assert contents(folder) == contents(job.reference)


def test_a_full_disk_is_one_sentence_and_nothing_is_encoded_twice(job, folder, monkeypatch):
    job.interrupt(folder, 15, Stop())
    listed = [f"{shard.path}.npy" for source in read_manifest(folder).sources for shard in source.shards("train")]
    done = {name: (folder / name).stat().st_mtime_ns for name in listed}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write .*No space left on device; free space"):
            job.run(folder)
    assert not list(folder.rglob("*.tmp"))
    job.run(folder)
    assert listed and done == {name: (folder / name).stat().st_mtime_ns for name in listed}


def test_a_killed_process_leaves_what_can_be_gone_on_with(job, folder):
    """SIGKILL in the middle of a file, with no chance to clean up."""
    code = """
import itertools, os, signal, sys
from pathlib import Path
from dsv3 import files
from dsv3.data.prepare import *
calls, sync = itertools.count(), os.fsync
def kill(descriptor):
    if next(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
files.os.fsync = kill
prepare(sys.argv[1], Path(sys.argv[2]), 400, DataConfig(seed=int(sys.argv[3]), shard_tokens=1500))
"""
    process = subprocess.run([sys.executable, "-c", code, job.spec, str(folder), str(job.config.seed)])
    assert process.returncode == -signal.SIGKILL
    assert list(folder.rglob(".*.tmp")), "the process was killed between two files"
    job.run(folder)
    assert contents(folder) == contents(job.reference)


@pytest.mark.parametrize("damage", ["missing", "changed"])
@pytest.mark.parametrize("ending", [".npy", ".index.jsonl"])
def test_damaged_shards_are_made_again(job, folder, rng, damage, ending):
    shutil.copytree(job.reference, folder)
    path = rng.choice(sorted(folder.rglob(f"*{ending}")))
    path.unlink() if damage == "missing" else path.write_bytes(b"\0" + path.read_bytes()[1:])
    with pytest.raises(UserError, match="again to mend it"):
        load_prepared(folder)
    messages: list[str] = []
    job.run(folder, report=messages.append)
    assert contents(folder) == contents(job.reference)
    assert path.name in messages[0] and messages[0].startswith("making again")


@pytest.fixture
def change(job):
    """Changes the first source, and undoes it in the end."""
    original = job.records.read_text()

    def change(how: str) -> None:
        lines = original.splitlines(keepends=True)
        changed = {
            "more": [*lines, lines[0]],
            "less": lines[:-1],
            "order": [lines[1], lines[0], *lines[2:]],
            "back": lines,
        }
        job.records.write_text("".join(changed[how]))

    yield change
    change("back")


@pytest.mark.parametrize("how", ["more", "less", "order"])
def test_a_source_that_changed_meanwhile_is_an_error(job, folder, change, how):
    job.interrupt(folder, 6, Stop())
    change(how)
    with pytest.raises(UserError, match=r"records\.jsonl' has changed since its preparation began"):
        job.run(folder)
    change("back")
    job.run(folder)
    assert contents(folder) == contents(job.reference)


@pytest.mark.parametrize("how", ["more", "less", "order"])
def test_what_was_made_while_a_source_was_changed_is_made_again(job, folder, change, how):
    job.interrupt(folder, 3, Stop())  # read and counted, but nothing is encoded yet
    change(how)
    with pytest.raises(UserError, match="has changed since its preparation began"):
        job.run(folder)
    assert read_manifest(folder).sources[0].units
    change("back")
    job.run(folder)
    assert contents(folder) == contents(job.reference)


def test_a_source_that_vanished_meanwhile_is_an_error(job, folder, tmp_path):
    job.interrupt(folder, 8, Stop())
    job.records.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="there is no source"):
        job.run(folder)
    assert job.run(job.reference).sources, "complete data needs its sources no more"
    (tmp_path / "elsewhere").rename(job.records)
    job.run(folder)
    assert contents(folder) == contents(job.reference)


def test_complete_data_is_left_alone(job):
    before = {path: path.stat().st_mtime_ns for path in job.reference.rglob("*")}
    job.run(job.reference)
    assert before == {path: path.stat().st_mtime_ns for path in job.reference.rglob("*")}


def test_data_of_other_settings_is_never_touched(job, tokenizer):
    before = contents(job.reference)
    others = [
        (job.spec, 500, job.config, "tokenizer 400, not 500"),
        (job.spec, tokenizer, job.config, f"tokenizer 400, not '{tokenizer.fingerprint}'"),
        (str(job.records), 400, job.config, "spec"),
        (job.spec, 400, dataclasses.replace(job.config, fim_rate=0.0), "fim_rate 0.1, not 0.0"),
    ]
    for spec, tokenizer_, config, says in others:
        with pytest.raises(UserError, match=rf"holds data prepared with {says}.*choose another folder"):
            prepare(spec, job.reference, tokenizer_, config)
    assert contents(job.reference) == before


def test_another_tokenizer_in_the_folder_is_found_before_it_encodes(job, folder):
    job.interrupt(folder, 8, Stop())
    Tokenizer.train(["other"], 300).save(folder / "tokenizer")
    with pytest.raises(UserError, match=r"tokenizer\.json' has changed.*in another folder"):
        job.run(folder)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"spec": "no/such/file"}, "there is no source"),
        ({"spec": "1:some 0:other"}, "has weight 0"),
        ({"tokenizer": 10}, "vocab_size is 10"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, book, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        prepare(**{"spec": str(book), "folder": tmp_path / "data", "tokenizer": 300} | settings)
    assert not (tmp_path / "data").exists()


def test_a_broken_record_at_the_very_end_is_found_before_anything_is_encoded(tmp_path, records):
    with records.open("a") as file:
        file.write('{"text": ')
    with pytest.raises(UserError, match="line 151: not valid JSON"):
        prepare(str(records), tmp_path / "data", 300)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "setting",
    "held_out=0 held_out=1 held_out=nan fim_rate=-0.1 split_rate=1.1 max_bytes=0 shard_tokens=0".split(),
)
def test_settings_out_of_range_are_named(setting):
    name, text = setting.split("=")
    value = float(text) if name.endswith(("out", "rate")) else int(text)
    with pytest.raises(UserError, match=f"data setting '{name}' is {value}"):
        DataConfig(**{name: value})
