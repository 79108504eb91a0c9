"""From sources of text to a folder that training can start from.

All text is read once, to find what is broken before hours of work, to count it and to train the tokenizer; then
again to be encoded, unit by unit. What is in a unit follows from the text and the settings alone, so a preparation
that was killed goes on behind its last whole unit and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsv3.data.config import DataConfig
from dsv3.data.encode import DocumentEncoder
from dsv3.data.formats import Document
from dsv3.data.manifest import (
    ANEW,
    Extent,
    Manifest,
    SourceRecord,
    Unit,
    is_prepared,
    read_manifest,
    tokenizer_folder,
    write_manifest,
)
from dsv3.data.prepared import PreparedData, load_prepared
from dsv3.data.sample import TextSample
from dsv3.data.shards import ShardWriter, check_file, check_shard, sha256
from dsv3.data.sources import Source, first_bytes, parse_sources, read_source
from dsv3.data.split import SIDES, Part, Side, Split, plan_split
from dsv3.data.tokenizer import TOKENIZER_FILE, Tokenizer
from dsv3.errors import UserError

# Merges hardly change beyond this much text, while training time keeps growing.
_TOKENIZER_CHARACTERS = 20_000_000
_BATCH_CHARACTERS = 1 << 22  # how much text is encoded at once: enough to keep every core busy


@dataclass(frozen=True)
class Progress:
    """How far a stage of a preparation is; `total_bytes` is None where the end is not known."""

    stage: str
    text_bytes: int
    total_bytes: int | None = None
    tokens: int = 0


def prepare(
    spec: str,
    folder: Path,
    tokenizer: Tokenizer | int,
    config: DataConfig | None = None,
    *,
    report: Callable[[str], None] | None = None,
    advance: Callable[[Progress], None] | None = None,
) -> PreparedData:
    """Encode the sources of `spec` (see `parse_sources`) into `folder`.

    `tokenizer` is the one to encode with, or the number of ids of a new one, which is trained on up to 20 million
    characters of the training side, taken evenly and from each source in its share. `report` is told of each stage,
    `advance` of the progress in between.

    Called again with the same arguments it goes on where it was interrupted, makes again what is damaged, and leaves
    alone what is whole. Raises `UserError` for anything wrong with a source or a setting, a full disk, a source that
    changed meanwhile, or a folder with data of other settings; what is done by then is kept.
    """
    config = config or DataConfig()
    job = _Job(folder, config, report or (lambda message: None), advance or (lambda progress: None))
    settings = {
        "spec": spec,
        "tokenizer": tokenizer if isinstance(tokenizer, int) else tokenizer.fingerprint,
        **dataclasses.asdict(config),
    }
    manifest = job.take_up(settings) if is_prepared(folder) else job.begin(parse_sources(spec), tokenizer, settings)
    if not manifest.complete:
        job.encode(manifest)
    return load_prepared(folder, verify=False)


@dataclass(frozen=True)
class _Job:
    """One preparation: what each of its stages needs to know."""

    folder: Path
    config: DataConfig
    report: Callable[[str], None]
    advance: Callable[[Progress], None]

    def begin(self, sources: list[Source], tokenizer: Tokenizer | int, settings: dict[str, Any]) -> Manifest:
        """All that comes before the first token: what is held out, a look at all text, the tokenizer."""
        readers = {source.name: partial(self._documents, source.name) for source in sources}
        split = plan_split(readers, self.config.held_out, self.config.seed)
        records: list[SourceRecord] = []
        texts: list[str] = []
        for source in sources:
            sample = TextSample(int(_TOKENIZER_CHARACTERS * source.share), self.config.seed)
            whole = self._survey(source.name, split, sample if isinstance(tokenizer, int) else None)
            records.append(SourceRecord(source.name, source.share, whole))
            texts += sample.texts()
            self.report(f"read '{source.name}': {whole.documents:,} documents, {whole.text_bytes / 1e6:,.2f} MB")
        if isinstance(tokenizer, int):
            tokenizer = Tokenizer.train(texts, tokenizer)
            self.report(f"trained a tokenizer of {tokenizer.vocab_size} tokens")
        tokenizer.save(tokenizer_folder(self.folder))
        manifest = Manifest(
            settings=settings,
            python=platform.python_version(),
            tokenizer_sha256=sha256(tokenizer_folder(self.folder) / TOKENIZER_FILE),
            fingerprint=tokenizer.fingerprint,
            split=split,
            sources=tuple(records),
        )
        write_manifest(self.folder, manifest)
        return manifest

    def take_up(self, settings: dict[str, Any]) -> Manifest:
        """The manifest of what an earlier call left, without what has been damaged since."""
        manifest = read_manifest(self.folder)
        for name, value in settings.items():
            if (old := manifest.settings.get(name)) != value:
                raise UserError(
                    f"'{self.folder}' holds data prepared with {name} {old!r}, not {value!r}; choose another folder"
                )
        check_file(tokenizer_folder(self.folder) / TOKENIZER_FILE, manifest.tokenizer_sha256, ANEW)
        for leftover in self.folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        for number, source in enumerate(manifest.sources):
            source = dataclasses.replace(source, units=tuple(itertools.takewhile(self._is_whole, source.units)))
            manifest = manifest.with_source(number, source)
        return manifest

    def encode(self, manifest: Manifest) -> None:
        """Everything that is not in shards yet."""
        tokenizer = Tokenizer.load(tokenizer_folder(self.folder))
        encoder = DocumentEncoder(tokenizer, self.config.fim_rate, self.config.split_rate)
        for number, source in enumerate(manifest.sources):
            if source.complete:
                continue
            source = self._made_from_present_text(source, manifest.split)
            manifest = manifest.with_source(number, source)
            for end, writers in self._units(source, manifest.split, encoder):
                path = f"source-{number}/{{side}}-{len(source.units):05}"
                shards = {
                    side: writer.write(self.folder, path.format(side=side))
                    for side, writer in writers.items()
                    if writer.tokens
                }
                source = dataclasses.replace(source, units=(*source.units, Unit(end, shards)))
                manifest = manifest.with_source(number, source)
                write_manifest(self.folder, manifest)
            write_manifest(self.folder, manifest)
            train, held_out = (sum(shard.tokens for shard in source.shards(side)) for side in SIDES)
            self.report(f"encoded '{source.name}': {train:,} tokens to train on, {held_out:,} held out")

    def _survey(self, name: str, split: Split, sample: TextSample | None) -> Extent:
        """All of a source, whose training side goes into `sample`."""
        meter = _Meter(split)
        for batch in _batches(self._documents(name, self.report), _BATCH_CHARACTERS):
            for part in meter.parts(batch):
                if sample is not None and part.side == "train":
                    sample.add(part.text)
            self.advance(Progress(f"reading '{name}'", meter.extent().text_bytes))
        return meter.extent()

    def _made_from_present_text(self, source: SourceRecord, split: Split) -> SourceRecord:
        """`source`, if it is what it was, without units that were made from it while it was something else."""
        if not source.units:
            return source
        meter = _Meter(split)
        good = 0
        for document in self._documents(source.name):
            meter.parts([document])
            good += good < len(source.units) and meter.extent() == source.units[good].end
        _require_same(source.name, meter.extent(), source.whole)
        return dataclasses.replace(source, units=source.units[:good])

    def _units(
        self, source: SourceRecord, split: Split, encoder: DocumentEncoder
    ) -> Iterator[tuple[Extent, dict[Side, ShardWriter]]]:
        """What is left of a source in units: where each ends, and its documents, encoded."""
        documents = self._documents(source.name)
        meter = _Meter(split)
        if source.units:
            done = itertools.islice(documents, source.units[-1].end.documents)
            for batch in _batches(done, _BATCH_CHARACTERS):
                meter.parts(batch)
        tokens = sum(shard.tokens for side in SIDES for shard in source.shards(side))
        writers = _new_writers()
        # A batch belongs to one unit, so it may not be larger than one.
        for batch in _batches(documents, min(_BATCH_CHARACTERS, self.config.shard_tokens)):
            if sum(writer.tokens for writer in writers.values()) >= self.config.shard_tokens:
                yield meter.extent(), writers
                writers = _new_writers()
            parts = meter.parts(batch)
            for part, ids in zip(parts, encoder.encode(parts), strict=True):
                writers[part.side].add(part, ids)
                tokens += len(ids)
            text_bytes, total = meter.extent().text_bytes, source.whole.text_bytes
            self.advance(Progress(f"encoding '{source.name}'", text_bytes, total, tokens))
        _require_same(source.name, meter.extent(), source.whole)
        yield meter.extent(), writers

    def _documents(self, name: str, report: Callable[[str], None] | None = None) -> Iterator[Document]:
        return first_bytes(read_source(name, report), self.config.max_bytes)

    def _is_whole(self, unit: Unit) -> bool:
        try:
            for shard in unit.shards.values():
                check_shard(self.folder, shard)
        except UserError as error:
            self.report(f"making again: {error}")
            return False
        return True


class _Meter:
    """Splits documents and measures how far their source has been read."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._documents = self._text_bytes = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def parts(self, documents: Iterable[Document]) -> list[Part]:
        """The parts of the documents that come next."""
        parts: list[Part] = []
        for document in documents:
            parts += self._split.parts(document)
            self._documents += 1
        for part in parts:
            self._text_bytes += len(part.text.encode())
            self._digest.update(part.digest.to_bytes(8))
        return parts

    def extent(self) -> Extent:
        """All of the source so far."""
        return Extent(self._documents, self._text_bytes, self._digest.hexdigest())


def _batches(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """The documents in runs of at least so many characters, but for the last."""
    batch: list[Document] = []
    gathered = 0
    for document in documents:
        batch.append(document)
        gathered += len(document.text)
        if gathered >= characters:
            yield batch
            batch, gathered = [], 0
    if batch:
        yield batch


def _new_writers() -> dict[Side, ShardWriter]:
    return {side: ShardWriter() for side in SIDES}


def _require_same(source: str, found: Extent, expected: Extent) -> None:
    if found != expected:
        raise UserError(
            f"source '{source}' has changed since its preparation began ({found.documents:,} documents of "
            f"{found.text_bytes:,} bytes, expected {expected.documents:,} of {expected.text_bytes:,}, or the same with "
            "other content); bring back what it was, or prepare it in another folder"
        )
