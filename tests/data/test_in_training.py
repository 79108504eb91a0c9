"""Training from prepared data: in place, from several sources, refused where it does not fit."""

import json
from pathlib import Path

import pytest

from dsv3.data.config import DataConfig
from dsv3.data.manifest import is_prepared
from dsv3.data.prepare import prepare
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.train.config import TrainConfig
from dsv3.train.trainer import resume_run, start_run


class Messages(list):
    def update(self, step, metrics):
        pass

    log = list.append


def settings(out: Path, data: str) -> TrainConfig:
    options = {"model": "micro", "tokens": "256", "batch_size": "4", "seq_len": 32, "eval_tokens": 128}
    return TrainConfig(out=out, data=data, device="cpu", dtype="float32", **options)


@pytest.fixture
def spec(tmp_path, write_text) -> str:
    for name in "ab":
        lines = [json.dumps({"text": f"{name} {write_text(3)}"}) + "\n" for _ in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return f"3:{tmp_path / 'a.jsonl'} 1:{tmp_path / 'b.jsonl'}"


def test_a_prepared_folder_is_trained_on_in_place(tmp_path, spec, monkeypatch):
    prepare(spec, tmp_path / "data", 300, DataConfig(held_out=0.2))
    monkeypatch.chdir(tmp_path)
    trainer = start_run(settings(tmp_path / "run", "data"), lambda message: None)
    trainer.fit(Messages())
    assert not is_prepared(tmp_path / "run" / "data")
    assert Tokenizer.load(trainer.run.checkpoints()[-1]).fingerprint == trainer.data.tokenizer.fingerprint
    monkeypatch.chdir("/")
    assert resume_run(tmp_path / "run").step == 2
    (tmp_path / "data").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="data' holds no prepared data"):
        resume_run(tmp_path / "run")


def test_held_out_text_is_evaluated_by_source(tmp_path, spec):
    trainer = start_run(settings(tmp_path / "run", spec), lambda message: None)
    messages = Messages()
    trainer.fit(messages)
    for record in (record for record in trainer.run.records() if "bits_per_byte" in record):
        by_source = list(record["bits_per_byte_by_source"].values())
        assert len(by_source) == 2 and by_source[0] != by_source[1]
        assert record["bits_per_byte"] == pytest.approx(0.75 * by_source[0] + 0.25 * by_source[1])
    assert "a.jsonl" in messages[0] and "b.jsonl" in messages[0]


def test_a_start_that_was_interrupted_is_taken_up(tmp_path, spec):
    run = tmp_path / "run"
    start_run(settings(run, spec), lambda message: None)
    (run / "train.json").unlink()  # as if the process had been killed just before
    before = {path: path.stat().st_mtime_ns for path in (run / "data").rglob("*")}
    start_run(settings(run, spec), lambda message: None)
    assert before == {path: path.stat().st_mtime_ns for path in (run / "data").rglob("*")}


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path, spec):
    prepare(spec, tmp_path / "data", 330, DataConfig(held_out=0.2))
    with pytest.raises(UserError, match=r"vocabulary of 330, more than the model's vocab_size \(320\)"):
        start_run(settings(tmp_path / "run", str(tmp_path / "data")), lambda message: None)
