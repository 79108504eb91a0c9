"""A shard: token ids of whole documents, one behind the other, and an index of these documents.

The ids are a `.npy` file that is mapped and not read, so that a corpus may be larger than memory. The index says of
each document where it ends and where it came from: it answers what a model was looking at when its loss jumped.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3.data.manifest import ShardRecord
from dsv3.data.split import Part
from dsv3.errors import UserError
from dsv3.files import atomic_writer, make_folder

_REMEDY = "run the same `dsv3 data prepare` again to mend it"


@dataclass(frozen=True)
class Shard:
    """A shard as training reads it: its path without ending, and its ids [N], uint16 or uint32."""

    path: Path
    ids: np.ndarray

    def origins(self, start: int, stop: int) -> list[str]:
        """Where the documents came from of which a token is in `ids[start:stop]`, in order."""
        found, begin = [], 0
        with _index_file(self.path).open(encoding="utf-8") as file:
            for line in file:
                document = json.loads(line)
                if begin < stop and document["end"] > start:
                    found.append(str(document["origin"]))
                begin = document["end"]
        return found


class ShardWriter:
    """Gathers encoded documents, `tokens` ids by now, and writes them as one shard."""

    def __init__(self) -> None:
        self.tokens = 0
        self._ids: list[np.ndarray] = []
        self._index: list[str] = []
        self._text_bytes = 0

    def add(self, part: Part, ids: np.ndarray) -> None:
        """One more document and its ids [n], EOS included."""
        self._ids.append(ids)
        self.tokens += len(ids)
        self._text_bytes += len(part.text.encode())
        self._index.append(json.dumps({"end": self.tokens, "origin": part.origin}, ensure_ascii=False))

    def write(self, folder: Path, path: str) -> ShardRecord:
        """Write the shard `path` of `folder`, each of its files atomically. Needs a document at least."""
        ids_file, index_file = _ids_file(folder / path), _index_file(folder / path)
        make_folder(ids_file.parent)
        with atomic_writer(ids_file) as file:
            np.save(file, np.concatenate(self._ids), allow_pickle=False)
        with atomic_writer(index_file) as file:
            file.writelines(f"{line}\n".encode() for line in self._index)
        return ShardRecord(path, self.tokens, len(self._ids), self._text_bytes, sha256(ids_file), sha256(index_file))


def open_shard(folder: Path, record: ShardRecord) -> Shard:
    """The shard of `record`, its ids mapped. Raises `UserError` if they are not the recorded number of ids."""
    path = folder / record.path
    try:
        ids = np.lib.format.open_memmap(_ids_file(path), mode="r")  # unlike np.load never a pickle
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read the token ids '{_ids_file(path)}': {error}; {_REMEDY}") from error
    if ids.shape != (record.tokens,) or ids.dtype not in (np.uint16, np.uint32):
        raise UserError(
            f"'{_ids_file(path)}' holds {ids.dtype} of shape {ids.shape}, expected {record.tokens} ids; {_REMEDY}"
        )
    return Shard(path, ids)


def check_shard(folder: Path, record: ShardRecord) -> None:
    """Raises `UserError` if a file of the shard is missing or is not, to the byte, the one that was written."""
    path = folder / record.path
    check_file(_ids_file(path), record.ids_sha256, _REMEDY)
    check_file(_index_file(path), record.index_sha256, _REMEDY)


def check_file(path: Path, expected_sha256: str, remedy: str) -> None:
    """Raises `UserError`, with what to do, if a file is missing or its content is not the expected one."""
    if not path.is_file():
        raise UserError(f"'{path}' is missing; {remedy}")
    if sha256(path) != expected_sha256:
        raise UserError(f"'{path}' has changed since it was prepared (its SHA-256 differs); {remedy}")


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ids_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.npy")


def _index_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.jsonl")
