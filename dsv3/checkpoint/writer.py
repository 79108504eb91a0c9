"""Writing a checkpoint folder: all of it or nothing, and never more than a piece of one tensor in memory.

All shapes and dtypes are known before the first byte, so every shard's header is written first and each piece
goes to its place as it comes. (safetensors' own `save_file` wants a whole shard at once.) Everything is written
into a hidden folder beside the target, which takes the target's name when it is complete and on the disk: a
crash, a full disk or an interrupt leaves what was there before.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.checkpoint.hf_config import save_config
from dsv3.checkpoint.reader import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE
from dsv3.errors import UserError
from dsv3.files import new_folder, refusals

MAX_SHARD_BYTES = 5 * 10**9
WRITE_BYTES = 2**20  # in one call; ext4 took 4 to 8 times as long over the same bytes in calls of 32 MiB

_NAMES = {**DTYPE_NAMES, torch.int64: "I64", torch.int32: "I32", torch.int16: "I16"}

Progress = Callable[[int, int], None]  # told the bytes written so far and the bytes in all


@dataclass(frozen=True)
class TensorEntry:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    target: str | Path,
    entries: Sequence[TensorEntry],
    pieces: Iterable[tuple[str, Tensor]],
    hf_config: Mapping[str, Any],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    copy_files: Iterable[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint folder at `target`.

    entries: what will be written, in the order in which `pieces` gives it. pieces: name and data; each tensor whole,
    or its rows in several pieces one after the other. hf_config: the contents of config.json.
    overwrite: replace a checkpoint at `target`, whole, once the new one is complete. max_shard_bytes: a shard holds
    no more, unless a single tensor does. copy_files: further files to copy into the folder (a tokenizer). progress:
    called after each piece.
    Raises `UserError` if the target is in the way or the disk refuses; no half-written folder is left behind then.
    """
    target = Path(target).resolve()
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    _check_target(target, overwrite)
    with refusals(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target, sum(entry.nbytes for entry in entries))
    with new_folder(target, overwrite=overwrite) as folder:
        _write_files(folder, entries, pieces, hf_config, max_shard_bytes, copy_files, progress)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file, expected the name of a folder to write")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} exists and is not empty: choose another folder or ask to overwrite it")
    # Overwriting removes the folder whole, so it must be a checkpoint and nothing more.
    is_checkpoint = any((target / name).is_file() for name in (INDEX_FILE, SINGLE_FILE))
    if not is_checkpoint or any(p.is_dir() for p in target.iterdir()):
        raise UserError(
            f"{target} is not overwritten because it is no mere checkpoint: remove it yourself if you mean to"
        )


def check_space(target: Path, needed: int) -> None:
    """Raise `UserError` if the disk has no room for `needed` bytes more beside `target`."""
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise UserError(f"{target} needs {needed / 1e9:.1f} GB, but {target.parent} has {free / 1e9:.1f} GB free")


def _write_files(
    folder: Path,
    entries: Sequence[TensorEntry],
    pieces: Iterable[tuple[str, Tensor]],
    hf_config: Mapping[str, Any],
    max_shard_bytes: int,
    copy_files: Iterable[Path],
    progress: Progress | None,
) -> None:
    total = sum(entry.nbytes for entry in entries)
    done = 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    stream = iter(pieces)
    for file, shard in shard_files(entries, max_shard_bytes).items():
        _write_shard(folder / file, shard, stream, wrote)
    write_companions(folder, entries, hf_config, max_shard_bytes, copy_files)


def write_companions(
    folder: Path,
    entries: Sequence[TensorEntry],
    hf_config: Mapping[str, Any],
    max_shard_bytes: int,
    copy_files: Iterable[Path],
) -> None:
    """What a folder has beside its shards: the index, config.json, copies of `copy_files`."""
    files = shard_files(entries, max_shard_bytes)
    weight_map = {entry.name: file for file, shard in files.items() for entry in shard}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    save_config(folder, hf_config)
    for path in copy_files:
        shutil.copyfile(path, folder / path.name)


def shard_files(entries: Sequence[TensorEntry], max_shard_bytes: int) -> dict[str, list[TensorEntry]]:
    """Which entries go into which file."""
    shards = _split(entries, max_shard_bytes)
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _split(entries: Sequence[TensorEntry], max_shard_bytes: int) -> list[list[TensorEntry]]:
    """Consecutive entries into shards of at most `max_shard_bytes`, at least one entry each."""
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def shard_header(
    entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file, with `metadata`, and at which byte of the file each tensor starts.

    The format: header length (u64 little endian), JSON header, data without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    # Wide dtypes first, so that each tensor starts at a multiple of its item size and can be mapped in place.
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
        span = [offset, offset + entry.nbytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    beginning = len(text).to_bytes(8, "little") + text
    return beginning, {entry.name: len(beginning) + header[entry.name]["data_offsets"][0] for entry in entries}


def _write_shard(
    file: Path,
    entries: Sequence[TensorEntry],
    stream: Iterator[tuple[str, Tensor]],
    wrote: Callable[[int], None],
) -> None:
    beginning, offsets = shard_header(entries)
    with file.open("wb") as out:
        out.write(beginning)
        for entry in entries:
            out.seek(offsets[entry.name])
            missing = entry.nbytes
            while missing > 0:
                name, piece = next(stream, ("nothing", torch.empty(0)))
                missing -= piece.nbytes
                if (name, piece.shape[1:], piece.dtype) != (entry.name, entry.shape[1:], entry.dtype) or missing < 0:
                    raise AssertionError(f"expected {entry}, got {name} {tuple(piece.shape)} {piece.dtype}")
                data = piece.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                for start in range(0, piece.nbytes, WRITE_BYTES):
                    out.write(data[start : start + WRITE_BYTES])
                wrote(piece.nbytes)
