"""Where text comes from: the user's own files, or, with no download at all, Python's standard library.

`read_corpus` turns one string from the command line into a stream of documents in an order that depends on
the files alone, so that two readings of a corpus give the same training data. What a user names directly
must be readable text or it is an error; a folder may hold other things besides, which are passed over.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dsv3.errors import UserError

STDLIB = "stdlib"

# Installed packages are not the standard library; tests repeat the code they test; the character maps of
# `encodings` and the manual of `pydoc_data` are generated tables that would make up a fifth of the corpus.
_NOT_SOURCE = frozenset(["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"])
# Written when the interpreter was built, with the paths of the machine that built it.
_BUILD_DATA = "_sysconfigdata"


@dataclass(frozen=True)
class Document:
    """One text, never empty, always encodable as UTF-8, and where it was found (for messages)."""

    text: str
    source: str


def read_corpus(spec: str, progress: Callable[[str], None] | None = None) -> Iterator[Document]:
    """The documents that `spec` names, in a fixed order.

    `spec` is `"stdlib"` (the sources of this Python's standard library), or the path of
    a text file (UTF-8, any ending), a `.jsonl` file (one object a line, its field `text`), a `.parquet` file
    (its column `text`; needs pyarrow), or a folder of these, read recursively without hidden files.
    A folder called stdlib is `./stdlib`. `progress` is told how many files of a folder were passed over.

    Raises `UserError`, at the call or while reading, for a missing path, a file that is empty, binary or
    unreadable, a broken record (with its line), or a folder without any text.
    """
    if spec == STDLIB:
        return _or_error(_read_stdlib(), "this Python carries no sources of its standard library; name your own text")
    path = Path(os.path.expanduser(spec))  # Path.expanduser fails on an unknown user
    if spec and path.is_dir():  # an empty name would be the current folder
        return _or_error(_read_folder(path, progress), f"folder '{spec}' holds no text; name one with UTF-8 files")
    if path.is_file():
        return _or_error(_reader(path)(path, path.name), f"'{spec}' is empty; name a file with some text")
    raise UserError(f"there is no corpus '{spec}'; give '{STDLIB}' or the path of a text file or a folder")


def _or_error(documents: Iterator[Document], complaint: str) -> Iterator[Document]:
    for first in documents:
        return itertools.chain([first], documents)
    raise UserError(complaint)


def _read_stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _files(root, skip_folders=_NOT_SOURCE):
        if path.suffix == ".py" and not path.name.startswith(_BUILD_DATA):
            with contextlib.suppress(UserError):
                yield from _read_text(path, f"{STDLIB}/{path.relative_to(root).as_posix()}")


def _read_folder(root: Path, progress: Callable[[str], None] | None) -> Iterator[Document]:
    passed_over = 0
    for path in _files(root):
        read, source = _reader(path), path.relative_to(root).as_posix()
        try:
            yield from read(path, source)
        except UserError:
            if read is not _read_text:  # a broken record is a fault to mend, a picture among texts is not
                raise
            passed_over += 1
    if passed_over and progress is not None:
        progress(f"passed over {passed_over} files of '{root}' that are not UTF-8 text")


def _reader(path: Path) -> Callable[[Path, str], Iterator[Document]]:
    return {".jsonl": _read_json_lines, ".parquet": _read_parquet}.get(path.suffix.lower(), _read_text)


def _files(root: Path, skip_folders: frozenset[str] = frozenset()) -> list[Path]:
    """Regular, visible files below `root`, sorted by their path with forward slashes on every system."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip_folders and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(filter(Path.is_file, found), key=lambda path: path.relative_to(root).as_posix())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error


def _read_text(path: Path, source: str) -> Iterator[Document]:
    """The file as one document; none if it is empty. Raises `UserError` if it is not text."""
    with _opened(path) as file:
        data = file.read(8192)
        if b"\0" not in data:  # do not load a film to find out that it is one
            data += file.read()
    if b"\0" in data:
        raise UserError(f"'{path}' is a binary file (it holds NUL bytes); give UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    if text:
        yield Document(text, source)


def _read_json_lines(path: Path, source: str) -> Iterator[Document]:
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
            yield from _record(record["text"], where, f"{source}:{number}")


def _read_parquet(path: Path, source: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading '{path}' needs pyarrow; run: pip install 'dsv3[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise UserError(f"'{path}' has no column 'text'; it has {columns}")
            row = 0
            for batch in file.iter_batches(columns=["text"]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield from _record(value, f"'{path}', row {row}", f"{source}:{row}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not a readable Parquet file: {error}") from error


def _record(text: object, where: str, source: str) -> Iterator[Document]:
    """The document in one record's `text`; none if it is empty."""
    if not isinstance(text, str):
        raise UserError(f"{where}: 'text' is {type(text).__name__}, expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: 'text' holds half of a surrogate pair, which is not Unicode text") from error
    if text:
        yield Document(text, source)
