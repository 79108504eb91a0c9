"""Rows from rank to rank: an all-to-all with uneven splits, started here and waited for later.

What travels is said by a `Wire`, one for each direction: a dispatch (of tokens, and in the backward pass of the
gradients of answers) and a combine (of answers, and of the gradients of tokens). The report sends the first in FP8
and the second in BF16.

Shapes: N rows sent, D model, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.parallel.mesh import Axis


class Wire(Protocol):
    """How rows are encoded while they travel: some tensors of as many rows each (a payload, perhaps its scales)."""

    def pack(self, rows_ND: Tensor) -> tuple[Tensor, ...]: ...

    def unpack(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class PlainWire:
    """Rows in `dtype`; None sends them as they are."""

    dtype: torch.dtype | None = None

    def pack(self, rows_ND: Tensor) -> tuple[Tensor, ...]:
        return (rows_ND if self.dtype is None else rows_ND.to(self.dtype),)

    def unpack(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return parts[0].to(dtype)


@dataclass(frozen=True)
class Wires:
    """The encoding of either direction."""

    dispatch: Wire = PlainWire()
    combine: Wire = PlainWire()


@dataclass(frozen=True)
class RowExchange:
    """The first send[0] rows go to the axis's first rank and so on; what comes lies in the order of ranks.

    An `Exchange` (`dsv3.parallel.pieces`). A rank that has nothing to send and nothing to receive takes part.
    """

    axis: Axis
    send: list[int]  # rows to each rank
    receive: list[int]  # rows from each rank
    wire: Wire = PlainWire()
    wire_back: Wire = PlainWire()

    def start(self, x: Tensor) -> _RowsUnderWay:
        """Begin to send the rows of x [N, ...]."""
        sent = [part.contiguous() for part in self.wire.pack(x)]
        arriving = tuple(part.new_empty(sum(self.receive), *part.shape[1:]) for part in sent)
        works = [
            dist.all_to_all_single(out, part, self.receive, self.send, group=self.axis.group, async_op=True)
            for out, part in zip(arriving, sent, strict=True)
        ]
        return _RowsUnderWay(works, sent, arriving, self.wire, x.dtype)

    def transposed(self) -> RowExchange:
        """The rows' way back."""
        return replace(self, send=self.receive, receive=self.send, wire=self.wire_back, wire_back=self.wire)

    def plain(self) -> RowExchange:
        """The same for rows that are sent as they are: weights, indices."""
        return replace(self, wire=PlainWire(), wire_back=PlainWire())


@dataclass
class _RowsUnderWay:
    works: list[dist.Work]
    sent: list[Tensor]
    arriving: tuple[Tensor, ...]
    wire: Wire
    dtype: torch.dtype

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        # Until now nobody else may have this memory. From now on all may: on a GPU `Work.wait` makes the current
        # stream, to which the allocator gives it back, come after the collective's.
        self.sent.clear()

    def arrived(self) -> Tensor:
        return self.wire.unpack(self.arriving, self.dtype)


def exchange_counts(counts_RX: Tensor, axis: Axis) -> Tensor:
    """Row r goes to rank r of the axis; returns the rows that came, by sender. Whole numbers, no gradient."""
    received_RX = torch.empty_like(counts_RX)
    dist.all_to_all_single(received_RX, counts_RX.contiguous(), group=axis.group)
    return received_RX


def all_gather_flat(mine_N: Tensor, axis: Axis) -> Tensor:
    """[ranks, N]: the vector of every rank."""
    out = mine_N.new_empty(axis.size * mine_N.shape[0])
    # torch 2.13 renamed both this and the next.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, mine_N, group=axis.group)
    return out.view(axis.size, -1)


def reduce_scatter_flat(blocks_RN: Tensor, axis: Axis) -> Tensor:
    """[N]: this rank's row of the sum of all ranks' tables."""
    out = torch.empty_like(blocks_RN[0])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(out, blocks_RN.flatten(), group=axis.group)
    return out
