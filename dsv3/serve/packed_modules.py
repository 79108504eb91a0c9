"""Modules of a model that is for inference only: their weights packed, or quantised."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dsv3.model.experts import Experts
from dsv3.model.mla import LatentUpProjection
from dsv3.ops import native, native_prompts
from dsv3.ops.experts import few_rows
from dsv3.ops.native import Stored
from dsv3.ops.packed import LinearWeight, PackedWeight, packed_grouped_swiglu
from dsv3.ops.quantized import QuantizedWeight

Pack = Callable[[Tensor], LinearWeight]


class PackedLinear(nn.Module):
    """A linear map."""

    def __init__(self, linear: nn.Linear, pack: Pack) -> None:
        super().__init__()
        self._weight = pack(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self._weight.linear(x)

    def in_memory(self) -> Stored | None:
        """As our own kernels take it, if they do."""
        return self._weight.in_memory()


class PackedUpProjection(PackedLinear):
    """`LatentUpProjection`, never quantised.

    Decoding multiplies by its maps head by head, for which there is no kernel with integers; and prompts and decoded
    tokens should meet the same map.
    """

    def __init__(self, linear: LatentUpProjection) -> None:
        super().__init__(linear, PackedWeight)
        stored = self._weight.in_memory()
        weight = linear.weight.detach() if stored is None else stored.weight
        self._up_HMC = weight.view(linear.by_head().shape)  # of which decoding takes each head's

    def by_head(self) -> Tensor:
        return self._up_HMC


class PackedExperts(nn.Module):
    """Routed experts, each map for itself."""

    def __init__(self, experts: Experts, pack: Pack) -> None:
        super().__init__()
        self._gate_up = [pack(weight) for weight in experts.gate_up_proj.detach()]
        self._down = [pack(weight) for weight in experts.down_proj.detach()]

    def forward(self, rows_ND: Tensor, weights_N: Tensor, counts_E: Tensor) -> Tensor:
        return packed_grouped_swiglu(rows_ND, weights_N, counts_E, self._gate_up, self._down)


class QuantizedExperts(nn.Module):
    """Routed experts of one kind of integers, stacked as our own kernel takes them."""

    def __init__(self, experts: Experts, kind: type[QuantizedWeight]) -> None:
        super().__init__()
        stacks = experts.gate_up_proj.detach(), experts.down_proj.detach()
        gate_up, down = (Stored.stack([kind.quantize(weight) for weight in stack]).in_large_pages() for stack in stacks)
        self._stored, self._rounds_activations = (gate_up, down), kind.rounds_activations
        self._gate_up, self._down = (list(map(kind, stored.unbind())) for stored in self._stored)

    def forward(self, rows_ND: Tensor, weights_N: Tensor, counts_E: Tensor) -> Tensor:
        few = few_rows(rows_ND, counts_E)
        if few or not self._rounds_activations:
            fast = (native.experts if few else native_prompts.experts)(rows_ND, weights_N, counts_E, *self._stored)
            if fast is not None:
                return fast
        return packed_grouped_swiglu(rows_ND, weights_N, counts_E, self._gate_up, self._down)

    def in_memory(self) -> tuple[Stored, Stored]:
        """Gate and up, then down, as our own kernels take them, if they do."""
        return self._stored
