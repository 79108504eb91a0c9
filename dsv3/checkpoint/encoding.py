"""From canonical tensors to the tensors of a file: which dtype each is written in, and how.

Saving a model and converting a folder differ only in where a tensor comes from; both are `write_model`. Tensors
pass in pieces of some rows, so that memory does not grow with the model, nor with its largest matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.hf_config import config_to_hf
from dsv3.checkpoint.names import CanonicalTensor, canonical_tensors
from dsv3.checkpoint.reader import DTYPE_NAMES
from dsv3.checkpoint.source import SCALE_SUFFIX, Stored
from dsv3.checkpoint.writer import MAX_SHARD_BYTES, Progress, TensorEntry, write_folder
from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.ops.fp8 import BLOCK, quantize_blocks, scale_shape

FP8 = torch.float8_e4m3fn
PIECE = 2**22  # elements converted at a time; of four times as many, the allocator returns the memory after each


def write_model(
    target: str | Path,
    config: ModelConfig,
    read: Callable[[CanonicalTensor, slice], Stored],
    stored_dtype: Callable[[CanonicalTensor], torch.dtype],
    *,
    dtype: torch.dtype | None,
    fp8: bool,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    copy_files: Iterable[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Write every canonical tensor of `config` into the folder `target`; `read` fetches some rows of one.

    dtype: of what is not FP8; None keeps each tensor's own. fp8: Linear weights as E4M3 blocks. The rest is as in
    `write_folder`.
    """
    check_dtype(dtype)
    # The dtypes of everything are settled here, so that a folder's size is known before its first byte.
    plan = [(t, written_dtype(t, stored_dtype(t), dtype, fp8)) for t in canonical_tensors(config)]
    entries = [entry for tensor, written in plan for entry in entries_of(tensor, written)]
    written_pieces = (piece for tensor, written in plan for piece in _encode(tensor, read, written))
    # The first entry is the embedding, which is never FP8.
    hf_config = config_to_hf(config, dtype=entries[0].dtype, fp8=fp8)
    write_folder(
        target,
        entries,
        written_pieces,
        hf_config,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        copy_files=copy_files,
        progress=progress,
    )


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise `UserError` unless `dtype` is None or one that weights can have."""
    if dtype is not None and (dtype == FP8 or dtype not in DTYPE_NAMES):
        names = ", ".join(str(known) for known in DTYPE_NAMES if known != FP8)
        raise UserError(f"dtype is {dtype}, expected one of {names} (FP8 weights are written with fp8)")


def written_dtype(tensor: CanonicalTensor, stored: torch.dtype, dtype: torch.dtype | None, fp8: bool) -> torch.dtype:
    """What a tensor that is `stored` in one dtype is written in; `dtype` and `fp8` as in `write_model`."""
    if tensor.kind == "bias":
        return torch.float32
    if fp8 and tensor.kind == "linear":
        return FP8
    if dtype is not None:
        return dtype
    return torch.bfloat16 if stored == FP8 else stored


def entries_of(tensor: CanonicalTensor, written: torch.dtype) -> Iterator[TensorEntry]:
    """The file's entries for one tensor: itself, and the scales of its blocks if it is written in FP8."""
    yield TensorEntry(tensor.name, tensor.shape, written)
    if written == FP8:
        yield TensorEntry(tensor.name + SCALE_SUFFIX, scale_shape(tensor.shape), torch.float32)


def _encode(
    tensor: CanonicalTensor, read: Callable[[CanonicalTensor, slice], Stored], written: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `entries_of`, in pieces. What is FP8 already keeps its bits: quantising would move its scales."""
    scales = []
    for rows in _pieces(tensor.shape):
        stored = read(tensor, rows)
        if written != FP8:
            yield tensor.name, stored.to(written)
            continue
        payload, scale = stored.payload, stored.scale
        if scale is None:
            payload, scale = quantize_blocks(payload)
            if not scale.isfinite().all():
                raise UserError(f"{tensor.name} has NaN or infinite weights, which FP8 blocks cannot hold")
        scales.append(scale)
        yield tensor.name, payload
    if scales:
        yield tensor.name + SCALE_SUFFIX, torch.cat(scales)


def _pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a tensor, cut into pieces of about `PIECE` elements between blocks of FP8."""
    rows = max(PIECE // math.prod(shape[1:]) // BLOCK, 1) * BLOCK
    for first in range(0, shape[0], rows):
        yield slice(first, min(first + rows, shape[0]))
