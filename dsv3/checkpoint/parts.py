"""A model whose parameters are spread over processes, to and from the one canonical checkpoint.

A process holds rows [begin, end) of some parameters' first dimension. `held_pieces` says which rows of which
canonical tensors these are: what each process reads when a run goes on, and what it writes when one is saved. So a
folder has no memory of the layout that wrote it: any other reads it, and nobody ever holds the whole model.

Writing: one process makes the files at their full size with their headers, each then fills in what it holds. They
must see the same file system.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.names import CanonicalTensor, canonical_tensors
from dsv3.checkpoint.source import Checkpoint
from dsv3.checkpoint.writer import WRITE_BYTES, TensorEntry, shard_header
from dsv3.config import ModelConfig
from dsv3.ops.fp8 import BLOCK

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """Rows of a canonical tensor, and where they lie in what the process holds of `tensor.param`."""

    tensor: CanonicalTensor
    rows: slice
    index: Index


def held_pieces(config: ModelConfig, held: Mapping[str, range]) -> Iterator[Piece]:
    """All pieces of the parameters and buffers in `held`, which gives the rows of each."""
    for tensor in canonical_tensors(config):
        span = held.get(tensor.param)
        if span is None:
            continue
        first, end = tensor.rows or (0, tensor.shape[0])
        if tensor.expert is not None:
            if tensor.expert in span:
                yield Piece(tensor, slice(0, end - first), (tensor.expert - span.start, slice(first, end)))
        elif (begin := max(first, span.start)) < (stop := min(end, span.stop)):
            index = slice(begin - span.start, stop - span.start)
            yield Piece(tensor, slice(begin - first, stop - first), (index,))


@torch.no_grad()
def read_parts(checkpoint: Checkpoint, config: ModelConfig, held: Mapping[str, tuple[Tensor, int]]) -> None:
    """Fill what a process holds of a model of `config`: parameters and buffers by name, each with its first row.

    Any dtypes and devices; needs the memory of the largest piece besides. Warns where MTP's copies of embedding and
    head are no copies. Raises `UserError` if a file is damaged.
    """
    for piece in held_pieces(config, {name: range(first, first + len(rows)) for name, (rows, first) in held.items()}):
        tensor, place = piece.tensor, held[piece.tensor.param][0][piece.index]
        start = piece.rows.start // BLOCK * BLOCK  # FP8 is read in whole blocks
        loaded = checkpoint.read(tensor, slice(start, piece.rows.stop)).to(place.dtype)[piece.rows.start - start :]
        if tensor.copy_of is None:
            place.copy_(loaded)
        elif not torch.equal(place, loaded.to(place.device)):
            path = checkpoint.reader.path
            warnings.warn(f"{path}: {tensor.name} differs from {tensor.copy_of}; MTP shares the latter", stacklevel=3)


def create_file(path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of `entries` at its full size, the data still to come."""
    header, offsets = shard_header(entries, metadata)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max((offsets[entry.name] + entry.nbytes for entry in entries), default=len(header)))
        os.fsync(file.fileno())


def fill_file(
    path: Path,
    entries: Sequence[TensorEntry],
    pieces: Iterable[tuple[str, int, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `pieces` (a tensor's name, the first row, the rows) to their places in a file of `create_file`."""
    _, offsets = shard_header(entries, metadata)
    by_name = {entry.name: entry for entry in entries}
    with path.open("r+b") as file:
        for name, row, values in pieces:
            entry = by_name[name]
            row_bytes = entry.nbytes // entry.shape[0] if entry.shape else 0
            file.seek(offsets[name] + row * row_bytes)
            data = values.to(entry.dtype).cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), WRITE_BYTES):
                file.write(data[start : start + WRITE_BYTES])
        file.flush()
        os.fsync(file.fileno())
