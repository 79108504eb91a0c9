"""A forward pass recorded in pieces, so that its backward can run piece by piece, whole or split in two.

Autograd runs a backward pass in one go. A pipeline needs more: to stop where a gradient travels over a link and do
something else meanwhile (overlap), and to compute the gradient of a stage's input now and those of its weights later
(zero bubble). So a `Tape` cuts the graph: what a piece has made is handed on without its graph. Going back, its
gradients from all the pieces that used it gather in a `Slot`, and are what its own piece continues with.

The way forward is recorded as a chunk hands its pieces over (`dsv3.parallel.pieces`); the way back is a chunk again.

The tape holds slots and ends of graphs, no tensors: what autograd does not keep for a gradient (token rows on their
way, answers to be summed) is free as soon as the chunk is past it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dsv3.model.transformer import Recompute
from dsv3.ops.recompute import selective_recomputation
from dsv3.parallel.pieces import Chunk, Exchange, Transfers
from dsv3.parallel.split import backward_input

T = TypeVar("T")

Lend = Callable[[Sequence[nn.Module]], AbstractContextManager[None]]
"""Inside, the weights of these modules are there (`dsv3.parallel.lending`)."""


def always_there(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """A `Lend` for weights that are never let go."""
    return nullcontext()


class Slot:
    """Where the gradient of a tensor gathers, from all its uses."""

    def __init__(self, of: Tensor) -> None:
        self.grad: Tensor | None = None
        self._zeros = partial(torch.zeros, of.shape, dtype=of.dtype, device=of.device)

    def add(self, gradient: Tensor) -> None:
        """From one more use. Never in place: `gradient` may be somebody else's too."""
        self.grad = gradient if self.grad is None else self.grad + gradient

    def total(self) -> Tensor:
        """The gradient, zeros if nothing has come."""
        return self._zeros() if self.grad is None else self.grad


def slot_of(x: Tensor) -> Slot:
    """The slot of what a tape has handed on."""
    slot: Slot = x.grad_fn.slot  # type: ignore[union-attr]
    return slot


@dataclass
class _Graph:
    """The graph of a piece, by its ends."""

    outputs: list[GradientEdge | None]  # None: has no gradient
    inputs: dict[Slot, GradientEdge]


@dataclass
class _Piece:
    graph: Callable[[], _Graph]  # the one kept, or one made again
    slots: list[Slot | None]  # of the outputs
    uses: Sequence[nn.Module]


@dataclass
class _Crossing:
    ways: list[tuple[Exchange, Slot, Slot]]  # how a gradient travels, from which slot, to which


class Tape:
    """One forward pass through one stage: a `Runner` that remembers. `recompute` as in `Transformer`.

    What has a gradient among the arguments of pieces comes from pieces, or is said to `enter`. lend: where weights are
    not always there, has those of the modules that a piece `uses` whenever something of it is computed.
    """

    def __init__(self, recompute: Recompute = "none", lend: Lend = always_there) -> None:
        self._recompute, self._lend = recompute, lend
        self._entries: list[_Piece | _Crossing] = []
        self._put_off: list[tuple[Sequence[nn.Module], Callable[[], None]]] = []

    def enter(self, x: Tensor) -> Tensor:
        """x from outside, for pieces to use; its gradient will be in its slot."""
        return _handed_on(x)

    def run(self, function: Callable[..., T], *arguments: Any, uses: Sequence[nn.Module] = ()) -> T:
        """As in `Runner`. uses: the modules whose parameters the function reads."""
        with self._lend(uses):
            outputs = self._call(function, arguments)
        graph = _graph(outputs, arguments)
        return self._record(lambda: graph, outputs, uses)

    def run_block(self, function: Callable[..., T], *arguments: Any, uses: Sequence[nn.Module] = ()) -> T:
        """The same for what "full" recomputation makes again: a block, or what it computes between its transfers."""
        if self._recompute != "full":
            return self.run(function, *arguments, uses=uses)

        def again() -> _Graph:
            with torch.enable_grad():
                return _graph(function(*arguments), arguments)

        with torch.no_grad(), self._lend(uses):
            outputs = function(*arguments)
        return self._record(again, outputs, uses)

    def _record(self, graph: Callable[[], _Graph], outputs: T, uses: Sequence[nn.Module]) -> T:
        handed_on: T = map_tensors(_handed_on, outputs)
        slots = [slot_of(x) if x.requires_grad else None for x in tensors_in(handed_on)]
        self._entries.append(_Piece(graph, slots, uses))
        return handed_on

    def cross(self, *pairs: tuple[Exchange, Tensor]) -> Chunk[tuple[Tensor, ...]]:
        """As in `Runner`; gradients travel when `backward` comes by."""
        transfers = tuple(exchange.start(x.detach()) for exchange, x in pairs)
        yield Transfers(transfers)
        arrived = tuple(_handed_on(transfer.arrived()) for transfer in transfers)
        ways = [
            (exchange.transposed(), slot_of(y), slot_of(x))
            for (exchange, x), y in zip(pairs, arrived, strict=True)
            if x.requires_grad
        ]
        self._entries.append(_Crossing(ways))
        return arrived

    def backward(self, *, split: bool = False) -> Chunk[None]:
        """From the gradients in the last slots to those of what had entered and, unless `split`, the parameters.

        With `split` the parameters get theirs in `backward_weights`; without, while the next gradients travel, if some
        will. What is not needed any more is freed on the way.
        """
        crossings = sum(isinstance(entry, _Crossing) for entry in self._entries)
        while self._entries:
            entry = self._entries.pop()
            if isinstance(entry, _Piece):
                with self._lend(entry.uses):
                    self._piece_backward(entry, split or crossings > 0)
                continue
            crossings -= 1
            # A zero gradient travels too: the other ranks wait for it.
            transfers = tuple(exchange.start(source.total()) for exchange, source, _ in entry.ways)
            if not split:
                self.backward_weights()
            yield Transfers(transfers)
            for (_, _, target), transfer in zip(entry.ways, transfers, strict=True):
                target.add(transfer.arrived())

    def backward_weights(self) -> None:
        """The parameters' gradients that a split backward put off."""
        for uses, finish in self._put_off:
            with self._lend(uses):
                finish()
        self._put_off.clear()

    def _piece_backward(self, piece: _Piece, split: bool) -> None:
        graph = piece.graph()
        pairs = [
            (output, slot.grad)
            for output, slot in zip(graph.outputs, piece.slots, strict=True)
            if output is not None and slot is not None and slot.grad is not None
        ]
        if not pairs:
            return
        outputs, gradients = zip(*pairs, strict=True)
        if split:
            found, finish = backward_input(outputs, gradients, list(graph.inputs.values()))
            self._put_off.append((piece.uses, finish))
            for slot, gradient in zip(graph.inputs, found, strict=True):
                if gradient is not None:
                    slot.add(gradient)
        else:
            torch.autograd.backward(outputs, gradients)

    def _call(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        with selective_recomputation() if self._recompute == "selective" else nullcontext():
            return function(*arguments)


class _HandOn(torch.autograd.Function):
    """x at the beginning of a new graph, which leaves the gradient in the slot and does not keep x for that.

    A leaf would be kept: autograd holds it to put its `.grad` there.
    """

    @staticmethod
    def forward(ctx, x, slot, _):  # type: ignore[no-untyped-def]
        ctx.slot = slot
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        if gradient is not None:
            ctx.slot.add(gradient)
        return None, None, None


def _handed_on(x: Tensor) -> Tensor:
    x = x.detach()
    if not x.is_floating_point():
        return x
    # Under recomputation nobody knows yet whether x depends on a parameter; a slot that gets no gradient costs nothing.
    anything = torch.empty(0, requires_grad=True)  # for autograd to see a reason to make a graph
    out: Tensor = _HandOn.apply(x, Slot(x), anything)
    return out


def _graph(outputs: Any, arguments: tuple[Any, ...]) -> _Graph:
    inputs = {slot_of(x): get_gradient_edge(x) for x in tensors_in(arguments) if x.requires_grad}
    return _Graph([get_gradient_edge(x) if x.requires_grad else None for x in tensors_in(outputs)], inputs)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """value with every tensor in it, however deep in tuples, dicts and dataclasses, replaced by function(tensor)."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: map_tensors(function, getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
        return dataclasses.replace(value, **fields)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in value, in the order in which `map_tensors` meets them."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found
