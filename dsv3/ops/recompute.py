"""Selective recomputation: keep the recipe of a tensor for the backward pass instead of the tensor.

Autograd keeps whatever a gradient will need, also what follows cheaply from something else that it keeps: the
output of a norm from its input, queries, keys and values from the latents, a SwiGLU's output from its input. The
report makes those again (sections 3.2.3 and 3.3.3). Running a whole block again would save more, at the price of
a third forward pass, attention included; here only what was marked runs twice.

A model marks with `recomputed(function, *inputs)`, which is `function(*inputs)` whose result remembers how it was
made. Within `selective_recomputation()` autograd, asked to save that result or a view of it, saves the recipe; the
inputs of a recipe may be results of recipes. The backward pass runs a recipe when it is first needed; all who need
the same result share it, and it is gone with the last of them. Gradients are those of an ordinary backward pass, bit
for bit where the kernels are deterministic: the same kernels see the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_RECIPE = "_dsv3_recipe"


def recomputed(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """function(*inputs), a tensor that the backward pass may make again from `inputs` if told to save memory.

    `function` must be deterministic and depend on nothing that changes but its inputs and, if it is a module, its
    parameters; a change of either in place before the backward pass is found there and raises `RuntimeError`. Outside
    `selective_recomputation()`, without gradients, under autocast and in compiled code this is a plain call.
    """
    out = function(*inputs)
    # A compiler decides for itself what to make again; under autocast the casts would not be repeated.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch.is_autocast_enabled(out.device.type):
        return out
    # The recipe sits on the memory and not on the tensor: views share it, and it goes when the memory goes.
    storage = out.untyped_storage()
    # A result that is its input (a cast to the same type) has nothing to be made from.
    if not any(isinstance(x, Tensor) and x.untyped_storage() is storage for x in inputs):
        setattr(storage, _RECIPE, _Recipe(function, inputs, out))
    return out


def selective_recomputation() -> torch.autograd.graph.saved_tensors_hooks:
    """A context for the forward pass: whatever `recomputed` marked in it is not kept for the backward pass."""
    return torch.autograd.graph.saved_tensors_hooks(_save, _load)


@dataclass(frozen=True)
class _Kept:
    """A tensor that has to be kept, and its version then: under hooks torch does not look for in-place changes."""

    tensor: Tensor
    version: int

    def load(self) -> Tensor:
        _check_unchanged(self.tensor, self.version)
        return self.tensor


@dataclass(frozen=True)
class _Derived:
    """A view, by its geometry, into what a recipe makes. Who holds this holds the recipe and its result."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def load(self) -> Tensor:
        return self.recipe.result().as_strided(self.size, self.stride, self.offset)


class _Recipe:
    """A result and how to make it again. No member leads back to the result's memory: a cycle would keep it alive."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[object, ...], out: Tensor) -> None:
        self._function = function
        self._inputs = [_save(x) if isinstance(x, Tensor) else x for x in inputs]
        parameters = function.parameters() if isinstance(function, nn.Module) else ()
        self._parameters = [(parameter, parameter._version) for parameter in parameters]
        self._of = (out._version, out.dtype)
        self._result: Tensor | None = None

    def makes(self, tensor: Tensor) -> bool:
        """Whether `tensor`, which lies in the result's memory, still is what the function returned, or a view of it."""
        return self._of == (tensor._version, tensor.dtype)

    def result(self) -> Tensor:
        if self._result is None:
            for parameter, version in self._parameters:
                _check_unchanged(parameter, version)
            inputs = [_load(x) if isinstance(x, (_Kept, _Derived)) else x for x in self._inputs]
            with torch.no_grad():
                self._result = self._function(*inputs)
            self._inputs.clear()  # results of other recipes that nobody else needs are free now
        return self._result


def _save(tensor: Tensor) -> _Kept | _Derived:
    recipe: _Recipe | None = getattr(tensor.untyped_storage(), _RECIPE, None)
    if recipe is not None and recipe.makes(tensor):
        return _Derived(recipe, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
    # Detached, because a node that keeps its own output would keep itself alive.
    return _Kept(tensor.detach(), tensor._version)


def _load(saved: _Kept | _Derived) -> Tensor:
    return saved.load()


def _check_unchanged(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in place after the "
            f"forward pass (version {tensor._version}, expected {version}): change it after backward()"
        )
