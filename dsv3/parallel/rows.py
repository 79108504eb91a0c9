"""Tensors whose rows some ranks share: made whole from everybody's rows, or whole ones summed into everybody's rows.

Tensors of one axis and dtype travel together, in buckets: a collective for each of the small ones would cost more
than what it carries, one for all of them a second copy of everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dsv3.parallel.exchange import all_gather_flat, reduce_scatter_flat
from dsv3.parallel.mesh import Axis

_BUCKET = 2**24  # elements that travel in one collective


def row_span(rows: int, axis: Axis, index: int | None = None) -> tuple[int, int]:
    """First row and number of rows of one rank (None: this one), as FSDP2 and `torch.chunk` divide: the last ranks may
    have fewer."""
    size = -(-rows // axis.size)
    begin = min((axis.index if index is None else index) * size, rows)
    return begin, min(size, rows - begin)


@torch.no_grad()
def gather_rows(rows: Mapping[str, Tensor], into: Mapping[str, Tensor], axes: Mapping[str, Axis]) -> None:
    """Fill the tensors of `into` with the rows that the ranks of their axes have, cast first if dtypes differ.

    Every rank of an axis must give the same names in the same order. Where an axis has one rank nothing is done.
    """
    for axis, names in _buckets(into, axes):
        widths = [_width(into[name], axis) for name in names]
        mine = torch.zeros(sum(widths), dtype=into[names[0]].dtype, device=into[names[0]].device)
        for name, values in zip(names, mine.split(widths), strict=True):
            values[: rows[name].numel()] = rows[name].reshape(-1)
        blocks = all_gather_flat(mine, axis)
        for name, block in zip(names, blocks.split(widths, dim=1), strict=True):
            for rank in range(axis.size):
                target = into[name].narrow(0, *row_span(into[name].shape[0], axis, rank))
                target.copy_(block[rank, : target.numel()].view_as(target))


@torch.no_grad()
def reduce_rows(whole: Mapping[str, Tensor], axes: Mapping[str, Axis]) -> dict[str, Tensor]:
    """This rank's rows of the sums over the tensors' axes, summed in FP32 at least; of an axis of one rank nothing.

    Every rank of an axis must give the same names in the same order.
    """
    out = {}
    for axis, names in _buckets(whole, axes):
        like, widths = whole[names[0]], [_width(whole[name], axis) for name in names]
        dtype = torch.promote_types(like.dtype, torch.float32)
        blocks = torch.zeros(axis.size, sum(widths), dtype=dtype, device=like.device)
        for name, block in zip(names, blocks.split(widths, dim=1), strict=True):
            for rank in range(axis.size):
                part = whole[name].narrow(0, *row_span(whole[name].shape[0], axis, rank))
                block[rank, : part.numel()] = part.reshape(-1)
        for name, values in zip(names, reduce_scatter_flat(blocks, axis).split(widths), strict=True):
            length = row_span(whole[name].shape[0], axis)[1]
            shape = (length, *whole[name].shape[1:])
            out[name] = values[: math.prod(shape)].view(shape)
    return out


def _buckets(tensors: Mapping[str, Tensor], axes: Mapping[str, Axis]) -> Iterator[tuple[Axis, list[str]]]:
    """Tensors that travel together: of one axis and dtype, and not too many elements."""
    buckets: dict[tuple[Axis, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        axis = axes[name]
        if axis.size == 1:
            continue
        bucket = buckets.setdefault((axis, tensor.dtype), [])
        bucket.append(name)
        if sum(tensors[other].numel() for other in bucket) >= _BUCKET:
            yield axis, buckets.pop((axis, tensor.dtype))
    for (axis, _), names in buckets.items():
        yield axis, names


def _width(tensor: Tensor, axis: Axis) -> int:
    """Elements of the largest rank's rows."""
    return row_span(tensor.shape[0], axis, 0)[1] * math.prod(tensor.shape[1:])
