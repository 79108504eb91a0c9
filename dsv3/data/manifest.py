"""What a folder of prepared data says of itself.

    manifest.json                     this: settings, split, sources, and for each shard its sizes and hashes
    tokenizer/tokenizer.json, ...
    source-0/train-00000.npy          token ids of whole documents, one behind the other
    source-0/train-00000.index.jsonl  a line for each of these documents: where it ends, where it came from
    source-0/held_out-00000.npy, ...

The manifest is written when the tokenizer is there and again after each shard: what it lists is there, whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from dsv3.data.split import Side, Split
from dsv3.errors import UserError
from dsv3.files import atomic_writer

ANEW = "prepare the data again in another folder"  # what to do about damage that cannot be mended

_NAME = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class ShardRecord:
    """One shard: its path in the folder, without ending, what is in it, and the SHA-256 of its two files."""

    path: str
    tokens: int
    documents: int
    text_bytes: int
    ids_sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Extent:
    """A stretch of a source from its beginning: `digest` depends on the text of all its documents."""

    documents: int
    text_bytes: int
    digest: str


@dataclass(frozen=True)
class Unit:
    """What is prepared in one go: the documents up to `end`, as a shard for each side that has some."""

    end: Extent
    shards: Mapping[Side, ShardRecord]


@dataclass(frozen=True)
class SourceRecord:
    """One source: all of it, and those units that are done."""

    name: str
    share: Fraction  # of the training sequences
    whole: Extent
    units: tuple[Unit, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether all of it is in shards."""
        return self.units != () and self.units[-1].end == self.whole

    def shards(self, side: Side) -> list[ShardRecord]:
        """The shards of one side, in order."""
        return [unit.shards[side] for unit in self.units if side in unit.shards]


@dataclass(frozen=True)
class Manifest:
    """Everything of a preparation but its tokens. Only with the same `settings` can it be taken up again."""

    settings: Mapping[str, Any]
    python: str  # the standard library is another text in each version
    tokenizer_sha256: str  # of tokenizer.json
    fingerprint: str  # the tokenizer's
    split: Split
    sources: tuple[SourceRecord, ...]

    @property
    def complete(self) -> bool:
        """Whether all sources are in shards."""
        return all(source.complete for source in self.sources)

    def with_source(self, number: int, source: SourceRecord) -> Manifest:
        """This, with another record of source `number`."""
        return dataclasses.replace(self, sources=(*self.sources[:number], source, *self.sources[number + 1 :]))


def is_prepared(folder: Path) -> bool:
    """Whether `folder` holds prepared data, be it complete or not."""
    return os.path.isfile(folder / _NAME)  # unlike Path.is_file, no error if `folder` cannot be a path


def tokenizer_folder(folder: Path) -> Path:
    """Where prepared data keeps its tokenizer."""
    return folder / "tokenizer"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put `manifest` in place of the one that is there, whole or not at all."""
    values = {
        "format": _FORMAT,
        "complete": manifest.complete,
        **dataclasses.asdict(manifest),
        "split": manifest.split.to_json(),
    }
    with atomic_writer(folder / _NAME) as file:
        file.write(json.dumps(values, indent=2, ensure_ascii=False, default=str).encode() + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`. Raises `UserError` if there is none, or none that this version can read."""
    path = folder / _NAME
    if not is_prepared(folder):
        raise UserError(f"'{folder}' holds no prepared data (no {_NAME}); prepare some with `dsv3 data prepare`")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise UserError(f"'{path}' has format {values['format']}, expected {_FORMAT}; {ANEW}")
        return Manifest(
            settings=dict(values["settings"]),
            python=str(values["python"]),
            tokenizer_sha256=str(values["tokenizer_sha256"]),
            fingerprint=str(values["fingerprint"]),
            split=Split.from_json(values["split"]),
            sources=tuple(map(_read_source, values["sources"])),
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"'{path}' is damaged ({error!r}); {ANEW}") from error


def _read_source(values: Mapping[str, Any]) -> SourceRecord:
    return SourceRecord(
        name=str(values["name"]),
        share=Fraction(values["share"]),
        whole=Extent(**values["whole"]),
        units=tuple(map(_read_unit, values["units"])),
    )


def _read_unit(values: Mapping[str, Any]) -> Unit:
    return Unit(Extent(**values["end"]), {side: ShardRecord(**shard) for side, shard in values["shards"].items()})
