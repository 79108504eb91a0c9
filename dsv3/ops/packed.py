"""Weights laid out once for the CPU's matrix units, for inference.

A matrix product on a CPU first brings its weight into blocks that fit the matrix units. Decoding multiplies a few rows
by every weight, so that this preparation costs more than the product; done once when the model is loaded, it costs
nothing. What oneDNN makes of a weight is of no use for anything else: a packed model is for inference only.

Shapes: N rows, I inputs, O outputs of a linear map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dsv3 import compat
from dsv3.ops import native
from dsv3.ops.native import Stored
from dsv3.ops.swiglu import weighted_swiglu

_FEW_ROWS = 8  # up to there our own kernel is faster than oneDNN on packed weights


class LinearWeight(ABC):
    """A linear map's weight [O, I] in a form of its own, on a CPU."""

    @abstractmethod
    def multiply(self, x_NI: Tensor) -> Tensor:
        """x W^T, [N, O] in x's dtype, of contiguous rows."""

    def in_memory(self) -> Stored | None:
        """The weight as our own kernels take it, if there is such a one."""
        return None

    def linear(self, x: Tensor) -> Tensor:
        """x W^T, [..., O], as `torch.nn.functional.linear` gives it."""
        return linear_by(x, self)


def linear_by(x: Tensor, weight: LinearWeight) -> Tensor:
    """`weight.linear(x)`. A `TorchFunctionMode` may take it over, as torch's own functions."""
    if has_torch_function((x,)):
        taken: Tensor = handle_torch_function(linear_by, (x,), x, weight)
        return taken
    return weight.multiply(x.reshape(-1, x.shape[-1]).contiguous()).unflatten(0, x.shape[:-1])


class PackedWeight(LinearWeight):
    """A weight in BF16, packed; and kept as it was where our own kernel can take that for a few rows."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._packed = compat.pack_linear_weight(weight_OI)
        stored = native.bf16_weight(weight_OI)
        self._stored = stored.in_large_pages() if stored.is_taken else None

    def multiply(self, x_NI: Tensor) -> Tensor:
        """As in `LinearWeight`."""
        if self._stored is not None and len(x_NI) <= _FEW_ROWS:
            fast = native.linear(x_NI, self._stored)
            if fast is not None:
                return fast
        return compat.packed_linear(x_NI, self._packed)

    def in_memory(self) -> Stored | None:
        """As in `LinearWeight`."""
        return self._stored


def can_pack(weight: Tensor) -> bool:
    """Whether packing pays and this torch can do it: BF16 on a CPU that multiplies BF16 in hardware."""
    return weight.is_cpu and weight.dtype == torch.bfloat16 and compat.cpu_has_bf16_gemm() and compat.can_pack_weights()


def packed_grouped_swiglu(
    x_ND: Tensor,
    weights_N: Tensor,
    counts_E: Tensor,
    gate_up_E: Sequence[LinearWeight],
    down_E: Sequence[LinearWeight],
) -> Tensor:
    """`ops.experts.reference_grouped_swiglu` with packed weights, no gradients. Returns [N, D]."""
    counts = [(e, count) for e, count in enumerate(counts_E.tolist()) if count]
    sizes = [count for _, count in counts]
    if not counts:
        return x_ND
    h_NG = torch.cat([gate_up_E[e].linear(x) for (e, _), x in zip(counts, x_ND.split(sizes), strict=True)])
    act_NF = weighted_swiglu(h_NG, weights_N)
    return torch.cat([down_E[e].linear(act) for (e, _), act in zip(counts, act_NF.split(sizes), strict=True)])
