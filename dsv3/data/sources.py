"""Where text comes from: the user's own files, the Hugging Face Hub, or, with no download at all, Python's library.

One string names all the data of a run: one source, or several, each with its share of the training sequences.
A source is read as a stream of documents in an order that depends on its files alone, so that two readings give
the same training data. What a user names directly must be readable text or it is an error; a folder may hold
other things besides, which are passed over.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from dsv3.data.formats import Document, NotTextError, read_file, read_hugging_face
from dsv3.errors import UserError

STDLIB = "stdlib"
HUGGING_FACE = "hf:"

_WEIGHT = re.compile(r"(?:^|\s)\s*(\d+(?:\.\d*)?|\.\d+):")

# Installed packages are not the standard library; tests repeat the code they test; the character maps of
# `encodings` and the manual of `pydoc_data` are generated tables that would make up a fifth of the corpus.
_NOT_SOURCE = frozenset(["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"])
# Written when the interpreter was built, with the paths of the machine that built it.
_BUILD_DATA = "_sysconfigdata"


@dataclass(frozen=True)
class Source:
    """One domain of the data: its name, which says where it lies, and its share of the training sequences."""

    name: str
    share: Fraction


def parse_sources(spec: str) -> list[Source]:
    """The sources that `spec` names: `NAME`, or `WEIGHT:NAME WEIGHT:NAME ...`; shares add up to 1.

    Weights are positive decimal numbers of any sum; a name may hold spaces. Raises `UserError` if a weight is zero
    or missing, or a name is empty or comes twice.
    """
    if _WEIGHT.search(spec) and not _WEIGHT.match(spec):
        raise UserError(f"'{spec}' gives a weight to some sources only; write WEIGHT:NAME for each")
    parts = _WEIGHT.split(spec)[1:] or ["1", spec]
    weights, names = [Fraction(weight) for weight in parts[::2]], [name.strip() for name in parts[1::2]]
    for name, weight in zip(names, weights, strict=True):
        if not name:
            raise UserError(f"'{spec}' has an empty name among its sources; write WEIGHT:NAME for each")
        if weight == 0:
            raise UserError(f"source '{name}' has weight 0, expected a positive number; leave it out instead")
        if names.count(name) > 1:
            raise UserError(f"source '{name}' is given twice; add up its weights")
    return [Source(name, weight / sum(weights)) for name, weight in zip(names, weights, strict=True)]


def read_source(name: str, report: Callable[[str], None] | None = None) -> Iterator[Document]:
    """The documents of one source, in a fixed order.

    `name` is `stdlib` (the sources of this Python's standard library), `hf:NAME` or `hf:NAME:CONFIG` (the training
    split of a dataset on the Hugging Face Hub, streamed), the path of a file (see `formats.read_file`) or of a
    folder of such files, read recursively without hidden ones, or a pattern of such paths (`*`, `?`, `[...]`, `**`).
    A folder called stdlib is `./stdlib`. `report` is told how many files of a folder were passed over.

    Raises `UserError`, at the call or while reading, for a missing path, a file that is empty, binary, damaged or
    unreadable, a broken record (with its line), or a folder without any text.
    """
    if name == STDLIB:
        return _or_error(_read_stdlib(), "this Python carries no sources of its standard library; name your own text")
    if name.startswith(HUGGING_FACE):
        dataset = name.removeprefix(HUGGING_FACE)
        return _or_error(read_hugging_face(dataset), f"dataset '{dataset}' is empty; name one with some text")
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        documents = read_file(Path(path), os.path.basename(path))
        return _or_error(documents, f"'{name}' is empty; name a file with some text")
    if os.path.isdir(path):
        files = {_relative(file, path): file for file in _files(path)}
    elif found := _matching(path):
        files = {_with_slashes(file): file for file in found}
    else:
        raise UserError(
            f"there is no source '{name}'; give '{STDLIB}', '{HUGGING_FACE}NAME', or the path of a text file, a folder "
            "or a pattern that matches some"
        )
    return _or_error(_read_files(name, files, report), f"'{name}' holds no text; name one with UTF-8 files")


def first_bytes(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """The documents up to `max_bytes` bytes of text, the last one cut to fit."""
    left = max_bytes
    for document in documents:
        if left is None:
            yield document
            continue
        data = document.text.encode()[:left]
        left -= len(data)
        if text := data.decode(errors="ignore"):
            yield Document(text, document.origin)
        if left == 0:
            return


def _or_error(documents: Iterator[Document], complaint: str) -> Iterator[Document]:
    for first in documents:
        return itertools.chain([first], documents)
    raise UserError(complaint)


def _read_stdlib() -> Iterator[Document]:
    root = sysconfig.get_paths()["stdlib"]
    for path in _files(root, skip_folders=_NOT_SOURCE):
        if path.endswith(".py") and not os.path.basename(path).startswith(_BUILD_DATA):
            with contextlib.suppress(NotTextError):
                yield from read_file(Path(path), f"{STDLIB}/{_relative(path, root)}")


def _read_files(name: str, files: dict[str, str], report: Callable[[str], None] | None) -> Iterator[Document]:
    passed_over = 0
    for origin, path in files.items():
        try:
            yield from read_file(Path(path), origin)
        except NotTextError:  # a broken record is a fault to mend, a picture among texts is not
            passed_over += 1
    if passed_over and report is not None:
        report(f"passed over {passed_over} files of '{name}' that are not UTF-8 text")


def _matching(pattern: str) -> list[str]:
    """The files that `pattern` matches and those below the folders that it matches, in order."""
    found = glob.glob(pattern, recursive=True)
    below = itertools.chain.from_iterable(_files(each) if os.path.isdir(each) else [each] for each in found)
    return sorted(set(below), key=_with_slashes)


def _files(root: str, skip_folders: frozenset[str] = frozenset()) -> list[str]:
    """Paths of the regular, visible files below `root`, in the same order on every system."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip_folders and not name.startswith(".")]
        found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return sorted(filter(os.path.isfile, found), key=_with_slashes)


def _relative(path: str, root: str) -> str:
    return _with_slashes(path).removeprefix(_with_slashes(root)).lstrip("/")


def _with_slashes(path: str) -> str:
    return path.replace(os.sep, "/")
