"""A computation in pieces, with what travels between them: written once, run in more than one way.

A *chunk* is a generator. It hands its pieces to a `Runner`, lets tensors cross over to other ranks in between, and
yields whenever something is on its way that it needs next. Whoever drives it decides what happens meanwhile: `drain`
waits, `dsv3.parallel.overlap` lets another chunk compute.

Two runners: `AtOnce` is the plain composition, under autograd as ever; a `Tape` (`dsv3.parallel.tape`) cuts the graph
between the pieces, so that the way back is a chunk too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Transfer(Protocol):
    """Something on its way."""

    def wait(self) -> None:
        """Return when it is there (on a GPU: when what is queued from now on comes after its arrival)."""

    def arrived(self) -> Tensor:
        """What came; to be asked after `wait`."""


class Exchange(Protocol):
    """A communication that autograd does not see: linear, with a transpose that is one too."""

    def start(self, x: Tensor) -> Transfer:
        """Begin to send x."""

    def transposed(self) -> Exchange:
        """The exchange that carries gradients back: combine for dispatch, dispatch for combine."""


@dataclass(frozen=True)
class Transfers:
    """Several as one: what the driver of a chunk has to wait for before the chunk can go on."""

    parts: tuple[Transfer, ...]

    def wait(self) -> None:
        """Until all are there."""
        for part in self.parts:
            part.wait()


Chunk = Generator[Transfers, None, T]


def drain(chunk: Chunk[T]) -> T:
    """Run a chunk alone, waiting for each of its transfers where it starts."""
    while True:
        try:
            transfers = next(chunk)
        except StopIteration as done:
            result: T = done.value
            return result
        transfers.wait()


class Runner(Protocol):
    """What a chunk hands its pieces to."""

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(*arguments) as one piece. Tensors may lie in tuples, dicts and dataclasses, in both directions."""

    def cross(self, *pairs: tuple[Exchange, Tensor]) -> Chunk[tuple[Tensor, ...]]:
        """Send every tensor through its exchange, all at once; what arrived. The tensors must come from pieces.

        Tensors of whole numbers have no gradient, and nothing travels back for them.
        """


class AtOnce:
    """The runner that cuts nothing: pieces are called, transfers waited for, and autograd sees one graph."""

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """function(*arguments)."""
        return function(*arguments)

    def cross(self, *pairs: tuple[Exchange, Tensor]) -> Chunk[tuple[Tensor, ...]]:
        """As in `Runner`; the backward pass sends the gradients through the transposed exchanges."""
        yield from ()
        exchanges, tensors = zip(*pairs, strict=True)
        arrived: tuple[Tensor, ...] = _Cross.apply(exchanges, *tensors)
        return arrived


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchanges, *tensors):  # type: ignore[no-untyped-def]
        ctx.exchanges = [e if x.is_floating_point() else None for e, x in zip(exchanges, tensors, strict=True)]
        return _travel(zip(exchanges, tensors, strict=True))

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        pairs = [(e.transposed(), g) for e, g in zip(ctx.exchanges, gradients, strict=True) if e is not None]
        arrived = iter(_travel(pairs))
        return None, *(None if e is None else next(arrived) for e in ctx.exchanges)


def _travel(pairs: Iterable[tuple[Exchange, Tensor]]) -> tuple[Tensor, ...]:
    transfers = Transfers(tuple(exchange.start(x) for exchange, x in pairs))
    transfers.wait()
    return tuple(transfer.arrived() for transfer in transfers.parts)
