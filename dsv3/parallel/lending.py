"""Weights that are whole only while a piece of a pass computes with them; otherwise each data rank keeps its rows.

FSDP2 does this by hooks on modules' calls, and a pipeline's stage is not called: a tape runs its pieces, forward and
in reverse, perhaps two stages in turns, and weights' gradients may come long after those of inputs. So pieces say which
modules they use (`Tape.run`), and around each of them, on its way forward and on its way back, `Lender.lend` gathers
these modules' weights and lets them go. What gradients have come by then is summed over the ranks, each of which adds
its rows of the sum to what it has: once per piece and micro-batch, for to add up whole gradients would take the memory
that sharing saves.

What is let go is the memory and not the tensor. Autograd keeps the tensor for the backward pass, and finds the values
in it again, because then, too, they are lent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dsv3.model.experts import Experts
from dsv3.model.norm import RMSNorm
from dsv3.model.router import Router
from dsv3.parallel.mesh import Axis, Mesh
from dsv3.parallel.rows import gather_rows, reduce_rows, row_span


@dataclass(frozen=True)
class _Place:
    """A parameter's place in the model, and the tensor that is put there while it is whole."""

    module: nn.Module
    attribute: str
    axis: Axis
    whole: nn.Parameter  # without memory between uses

    def rows(self) -> nn.Parameter:
        """This rank's, which are in the place between uses."""
        rows: nn.Parameter = getattr(self.module, self.attribute)
        return rows


class Lender:
    """Of a model that it has divided: the modules' weights, whole, for the time of a piece."""

    def __init__(self) -> None:
        self._places: dict[nn.Module, dict[str, _Place]] = {}  # of each module's own parameters, by full name

    def divide(self, model: nn.Module, mesh: Mesh, dtype: torch.dtype) -> set[str]:
        """Leave of every parameter the rows of this rank, in place and in its dtype; names of those divided.

        dtype: what whole weights are cast to. Routers stay whole (they are small, and FP32 whatever the rest is), so do
        norms (small, and made again in the backward pass of whichever piece used their output), and experts that no
        other rank of `dp_shard` has.
        """
        divided = set()
        for path, module in model.named_modules():
            axis = mesh.expert_shard if isinstance(module, Experts) else mesh.shard
            if isinstance(module, Router | RMSNorm) or axis.size == 1:
                continue
            for attribute, parameter in list(module.named_parameters(recurse=False)):
                name = f"{path}.{attribute}"
                begin, length = row_span(parameter.shape[0], axis)
                setattr(module, attribute, nn.Parameter(parameter.detach().narrow(0, begin, length).clone()))
                whole = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=mesh.device))
                whole.untyped_storage().resize_(0)
                self._places.setdefault(module, {})[name] = _Place(module, attribute, axis, whole)
                divided.add(name)
        return divided

    @contextmanager
    def lend(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, the weights of these modules are whole; what gradients they get is in the rows' afterwards.

        All ranks that share them do the same. Not to be nested for one module.
        """
        places = {
            name: place
            for module in modules
            for part in module.modules()
            for name, place in self._places.get(part, {}).items()
        }
        rows = {name: place.rows() for name, place in places.items()}
        axes = {name: place.axis for name, place in places.items()}
        # Through `data`, so that autograd does not take the return of the same values for a change.
        memory = {name: place.whole.data for name, place in places.items()}
        for tensor in memory.values():
            tensor.untyped_storage().resize_(tensor.nbytes)
        gather_rows(rows, memory, axes)
        for place in places.values():
            setattr(place.module, place.attribute, place.whole)
        try:
            yield
        finally:
            for name, place in places.items():
                setattr(place.module, place.attribute, rows[name])
                memory[name].untyped_storage().resize_(0)
        gradients = {name: g for name, place in places.items() if (g := place.whole.grad) is not None}
        for place in places.values():
            place.whole.grad = None
        for name, gradient in reduce_rows(gradients, axes).items():
            held = rows[name].grad
            rows[name].grad = gradient if held is None else held.add_(gradient)
