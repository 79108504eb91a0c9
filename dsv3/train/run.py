"""A run is a folder; everything that resumes, plots or compares runs reads it through here.

config.json     the model, in the official schema
train.json      the resolved settings
data/           tokenizer, packed tokens, their hashes (not if the data was prepared elsewhere)
eval/           packed tokens of `eval_data`
metrics.jsonl   one record a line, only ever appended to
checkpoints/    step-00000100/, ... each whole or not there at all
router/         which experts each token of some steps visited (`router_every`)
figures/
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3.checkpoint.locate import run_checkpoints
from dsv3.errors import UserError
from dsv3.files import atomic_writer, make_folder, refusals
from dsv3.train.config import TrainConfig


class Run:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, config: TrainConfig) -> Run:
        """A new run in `config.out`. Raises `UserError` if a run is there already."""
        cls.check_free(config.out)
        make_folder(config.out)
        return cls(config.out)

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise `UserError` if there is a run in `path` already."""
        if (path / "train.json").exists():
            raise UserError(
                f"there is already a run in {path}: resume it with `dsv3 train --resume {path}`, "
                "or choose another --out"
            )

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run. Raises `UserError` if `path` holds none."""
        if not (path / "train.json").is_file():
            raise UserError(f"there is no run in {path} (no train.json): give the folder that `dsv3 train` wrote")
        return cls(path)

    @property
    def data(self) -> Path:
        """Folder of the prepared data."""
        return self.path / "data"

    @property
    def domains(self) -> Path:
        """Folder of the text that is only measured (`eval_data`)."""
        return self.path / "eval"

    @property
    def figures(self) -> Path:
        """Folder of the figures."""
        return self.path / "figures"

    def save_settings(self, config: TrainConfig) -> None:
        """Written last in a run's preparation: its presence says that the run can be resumed."""
        write_json(self.path / "train.json", config.to_json())

    def settings(self) -> TrainConfig:
        """The resolved settings, with `out` where the folder lies now."""
        return TrainConfig.from_json(read_json(self.path / "train.json"), self.path)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to metrics.jsonl, behind a newline if a killed process left half a line."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        path = self.path / "metrics.jsonl"
        with refusals(path), path.open("a+b") as file:
            if file.tell() and not _ends_with_newline(file):
                line = b"\n" + line
            file.write(line)

    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says of each step, in order of steps: one merged record per step.

        A resumed run goes through the steps since its checkpoint again: what it wrote later counts. A line that a
        kill cut short is passed over. Raises `UserError` for one that is whole but no record.
        """
        path = self.path / "metrics.jsonl"
        by_step: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), start=1):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                raise UserError(f"{path}, line {number}, is no record of a step: remove the line")
            by_step.setdefault(record["step"], {}).update(record)
        return [by_step[step] for step in sorted(by_step)]

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return run_checkpoints(self.path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value`, whole or not at all."""
    with atomic_writer(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote. Raises `UserError` if it is missing or broken."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")
