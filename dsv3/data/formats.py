"""What a file holds: text as it is, records of JSON Lines or Parquet, either of the first two compressed.

Every reader yields `Document`s and raises `UserError` with the place at which a file is broken.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from dsv3.errors import UserError

_INSTALL = "run: pip install 'dsv3[data]'"
_COMPRESSED = (".gz", ".zst")


class NotTextError(UserError):
    """The file is in order, but it is not text."""


@dataclass(frozen=True)
class Document:
    """One text, never empty, always encodable as UTF-8, and where it was found (file, and line or row)."""

    text: str
    origin: str


def read_file(path: Path, origin: str) -> Iterator[Document]:
    """The documents of a file, in order; `origin` is what to call it.

    By its ending: `.jsonl` (one object a line, its field `text`), `.parquet` (its column `text`; needs pyarrow), any
    other a text in UTF-8, which is one document. Text and JSON Lines may be compressed (`.gz`; `.zst`, which needs
    pyarrow). Raises `UserError` while reading if the file is missing, damaged or holds a record without text, of
    which `NotTextError` if it is binary or not UTF-8.
    """
    inner = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    readers = {".jsonl": _read_json_lines, ".parquet": _read_parquet}
    return readers.get(inner.suffix.lower(), _read_text)(path, origin)


def read_hugging_face(name: str) -> Iterator[Document]:
    """Column `text` of the training split of a dataset on the Hugging Face Hub: `NAME` or `NAME:CONFIG`, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"reading the dataset '{name}' needs the package datasets; {_INSTALL}") from error
    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            if "text" not in row:
                raise UserError(f"dataset '{name}' has no column 'text'; it has {', '.join(row)}")
            yield from _record(row["text"], f"dataset '{name}', row {number}", f"{name}:{number}")
    except UserError:
        raise
    except Exception as error:  # the library lets through whatever its file systems and formats raise
        raise UserError(f"cannot read the dataset '{name}' from the Hugging Face Hub: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its ending says so."""
    try:
        with _open(path) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read '{path}': {reason}; replace it if it is damaged") from error


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if path.suffix.lower() == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(f"reading '{path}' needs pyarrow; {_INSTALL}") from error
        # Not the package zstandard: its reader takes a file that was cut short for one that ends there.
        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def _read_text(path: Path, origin: str) -> Iterator[Document]:
    """The file as one document; none if it is empty."""
    with _opened(path) as file:
        data = file.read(8192)
        if b"\0" not in data:  # do not load a film to find out that it is one
            data += file.read()
    if b"\0" in data:
        raise NotTextError(f"'{path}' is a binary file (it holds NUL bytes); give UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError(f"'{path}' is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    if text:
        yield Document(text, origin)


def _read_json_lines(path: Path, origin: str) -> Iterator[Document]:
    with _opened(path) as file:
        # Lines are cut in bytes, at \n alone: JSON strings may hold other line separators as they are.
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"'{path}', line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
            except (ValueError, RecursionError) as error:  # not UTF-8, absurd numbers, absurd nesting
                raise UserError(f"{where}: not readable as JSON ({error})") from error
            if not isinstance(record, dict) or "text" not in record:
                raise UserError(f"{where}: expected an object with a field 'text'")
            yield from _record(record["text"], where, f"{origin}:{number}")


def _read_parquet(path: Path, origin: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading '{path}' needs pyarrow; {_INSTALL}") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise UserError(f"'{path}' has no column 'text'; it has {columns}")
            row = 0
            for batch in file.iter_batches(columns=["text"]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield from _record(value, f"'{path}', row {row}", f"{origin}:{row}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not a readable Parquet file: {error}") from error


def _record(text: object, where: str, origin: str) -> Iterator[Document]:
    """The document in one record's `text`; none if it is empty."""
    if not isinstance(text, str):
        raise UserError(f"{where}: 'text' is {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: 'text' holds half of a surrogate pair, which is not Unicode text") from error
    if text:
        yield Document(text, origin)
