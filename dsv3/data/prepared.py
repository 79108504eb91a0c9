"""Prepared data, opened: the tokenizer, and each source's shards of both sides, mapped."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from dsv3.data.manifest import ANEW, SourceRecord, read_manifest, tokenizer_folder
from dsv3.data.shards import Shard, check_file, check_shard, open_shard
from dsv3.data.split import SIDES, Side
from dsv3.data.tokenizer import TOKENIZER_FILE, Tokenizer
from dsv3.errors import UserError


@dataclass(frozen=True)
class PreparedSource:
    """One domain: `share` of all training sequences come from `train`; nothing of `held_out` is in any of them."""

    name: str
    share: Fraction
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]


@dataclass(frozen=True)
class PreparedData:
    """A folder of prepared data."""

    folder: Path
    tokenizer: Tokenizer
    sources: tuple[PreparedSource, ...]


def load_prepared(folder: Path, *, tokenizer: Tokenizer | None = None, verify: bool = True) -> PreparedData:
    """Open what `prepare` left in `folder`; the token ids are mapped, not read.

    With `verify` every file is compared with its recorded SHA-256, which reads it once; of many processes one needs
    to do so. `tokenizer` is the one that the data must be encoded with, if that matters.

    Raises `UserError` if the preparation is not complete, a file is missing or not, to the byte, the one that was
    written, or the tokenizer is another.
    """
    manifest = read_manifest(folder)
    if tokenizer is not None and tokenizer.fingerprint != manifest.fingerprint:
        raise UserError(
            f"the data in '{folder}' is encoded with another tokenizer ({manifest.fingerprint}) than the model's "
            f"({tokenizer.fingerprint}); prepare it with the model's own"
        )
    if not manifest.complete:
        raise UserError(f"the data in '{folder}' is not complete; run the same `dsv3 data prepare` again to go on")
    check_file(tokenizer_folder(folder) / TOKENIZER_FILE, manifest.tokenizer_sha256, ANEW)

    def shards(source: SourceRecord, side: Side) -> tuple[Shard, ...]:
        if verify:
            for record in source.shards(side):
                check_shard(folder, record)
        return tuple(open_shard(folder, record) for record in source.shards(side))

    sources = tuple(
        PreparedSource(source.name, source.share, shards(source, "train"), shards(source, "held_out"))
        for source in manifest.sources
    )
    return PreparedData(folder, Tokenizer.load(tokenizer_folder(folder)), sources)


def describe(folder: Path) -> dict[str, Any]:
    """What is in a folder of prepared data, complete or not, by its manifest alone: plain values, sizes by source.

    Raises `UserError` if there is no manifest, or a damaged one.
    """
    manifest = read_manifest(folder)
    return {
        "folder": str(folder),
        "complete": manifest.complete,
        "settings": dict(manifest.settings),
        "tokenizer": manifest.fingerprint,
        "sources": [
            {
                "name": source.name,
                "share": float(source.share),
                "documents": source.whole.documents,
                "text_bytes": source.whole.text_bytes,
                **{side: _sizes(source, side) for side in SIDES},
            }
            for source in manifest.sources
        ],
    }


def _sizes(source: SourceRecord, side: Side) -> dict[str, int]:
    records = source.shards(side)
    return {
        "shards": len(records),
        **{name: sum(getattr(record, name) for record in records) for name in ("documents", "text_bytes", "tokens")},
    }
