"""Weights of 8 and 4 bits for inference on a CPU: decoding reads every weight for a few tokens, so bytes are its time.

Three kinds, each exactly the product with its own dequantised weight, up to the rounding of the result:

- `Int8Weight`: int8 with one scale for each output; activations stay BF16. A byte a weight.
- `Int4Weight`: 4 bits with a scale and a zero for each 32 inputs of an output; activations stay BF16. 5 bits a weight.
- `Int8DynamicWeight`: `Int8Weight`'s numbers, and activations rounded to int8 with one scale for each row, so that the
  product is one of integers. A byte a weight.

Shapes: N rows, I inputs, O outputs of a linear map, G groups of inputs.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3 import compat
from dsv3.ops import native
from dsv3.ops.packed import LinearWeight, Stored

GROUP = 32
_ONE_OR_TWO = 2  # rows for which our own kernel is faster than torch's
_FEW_ROWS = 12  # where multiplying by int8 directly is no longer faster than turning them into BF16 first
_PIECE = 2**19  # weights that are brought into another form at a time: they stay in the cache


def quantize_rows(x_NI: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(int8 [N, I] of -127 to 127, scale [N, 1] in `scale_dtype`) with x about their product.

    The integers are those of the rounded scale, so that a scale of few bits does not shift a whole row.
    """
    limit_N1 = x_NI.abs().amax(dim=-1, keepdim=True).float()
    scale_N1 = (limit_N1 / 127).clamp_min(torch.finfo(torch.float32).tiny).to(scale_dtype)
    return (x_NI / scale_N1.float()).round_().clamp_(-127, 127).to(torch.int8), scale_N1


def quantize_groups(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(int32 [O, I] of 0 to 15, scale [O, G], zero [O, G] in the weight's dtype): w about (q - 8) scale + zero.

    Each group's 16 steps reach from its least to its greatest weight. I is a multiple of `GROUP`.
    """
    groups_OGI = weight_OI.float().unflatten(1, (-1, GROUP))
    low_OG, high_OG = groups_OGI.amin(-1), groups_OGI.amax(-1)
    scale_OG = ((high_OG - low_OG) / 15).clamp_min(torch.finfo(torch.float32).tiny).to(weight_OI.dtype)
    zero_OG = (low_OG + 8 * scale_OG.float()).to(weight_OI.dtype)
    steps_OGI = (groups_OGI - zero_OG.float().unsqueeze(-1)) / scale_OG.float().unsqueeze(-1)
    return steps_OGI.round_().add_(8).clamp_(0, 15).int().flatten(1), scale_OG, zero_OG


def dequantize_groups(q_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    """The weight [O, I] in FP32 that the integers of `quantize_groups` stand for."""
    steps_OGI = (q_OI - 8).float().unflatten(1, (-1, GROUP))
    return (steps_OGI * scale_OG.float().unsqueeze(-1) + zero_OG.float().unsqueeze(-1)).flatten(1)


class QuantizedWeight(LinearWeight):
    """A weight, quantised; takes BF16 activations."""

    @abstractmethod
    def __init__(self, weight_OI: Tensor) -> None:
        """Of a weight in BF16."""

    @staticmethod
    @abstractmethod
    def available() -> bool:
        """Whether this torch and this CPU have its kernel."""

    @staticmethod
    @abstractmethod
    def fits(num_outputs: int, num_inputs: int) -> bool:
        """Whether its kernel takes a weight of this shape."""


class Int8Weight(QuantizedWeight):
    """int8, one scale for each output."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._set(*quantize_rows(weight_OI, weight_OI.dtype))

    @classmethod
    def of(cls, q_OI: Tensor, scale_O1: Tensor) -> Int8Weight:
        """Of what `quantize_rows` gives; `q_OI` is not copied."""
        weight = cls.__new__(cls)
        weight._set(q_OI, scale_O1)
        return weight

    def _set(self, q_OI: Tensor, scale_O1: Tensor) -> None:
        self._q_OI, self._scale_O = q_OI, scale_O1.squeeze(1)
        self._wide_scale_O = self._scale_O.float()

    @staticmethod
    def available() -> bool:
        return compat.has_int8_weight_gemm()

    @staticmethod
    def fits(num_outputs: int, num_inputs: int) -> bool:
        return num_inputs % 16 == 0

    def multiply(self, x_NI: Tensor) -> Tensor:
        if len(x_NI) <= _ONE_OR_TWO:
            fast = native.linear(x_NI, self._q_OI, self._wide_scale_O)
            if fast is not None:
                return fast
        if len(x_NI) <= _FEW_ROWS:
            return compat.int8_weight_linear(x_NI, self._q_OI, self._scale_O)
        size = max(1, _PIECE // x_NI.shape[1])
        pieces = zip(self._q_OI.split(size), self._scale_O.split(size), strict=True)
        outs = [F.linear(x_NI, q_OI.to(x_NI.dtype)).mul_(scale_O) for q_OI, scale_O in pieces]
        return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]

    def in_memory(self) -> Stored | None:
        """As in `LinearWeight`."""
        return (self._q_OI, self._wide_scale_O) if native.takes_linear(self._q_OI) else None


class Int4Weight(QuantizedWeight):
    """4 bits, a scale and a zero for each group of inputs of an output."""

    def __init__(self, weight_OI: Tensor) -> None:
        q_OI, scale_OG, zero_OG = quantize_groups(weight_OI)
        self._packed = compat.pack_int4_weight(q_OI)
        self._scale_and_zero_GO2 = torch.stack((scale_OG.T, zero_OG.T), dim=-1).contiguous()

    @staticmethod
    def available() -> bool:
        return compat.has_int4_weight_gemm()

    @staticmethod
    def fits(num_outputs: int, num_inputs: int) -> bool:
        return num_inputs % GROUP == 0 and num_outputs % 16 == 0

    def multiply(self, x_NI: Tensor) -> Tensor:
        return compat.int4_weight_linear(x_NI, self._packed, GROUP, self._scale_and_zero_GO2)


class Int8DynamicWeight(QuantizedWeight):
    """int8, one scale for each output, and activations in int8, one scale for each row."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._q_OI, scale_O1 = quantize_rows(weight_OI)
        self._scale_O = scale_O1.squeeze(1)

    @staticmethod
    def available() -> bool:
        return compat.cpu_has_int8_gemm()

    @staticmethod
    def fits(num_outputs: int, num_inputs: int) -> bool:
        return num_inputs % 16 == 0

    def multiply(self, x_NI: Tensor) -> Tensor:
        q_NI, scale_N1 = quantize_rows(x_NI)
        size = max(1, _PIECE // x_NI.shape[1])
        pieces = zip(self._q_OI.split(size), self._scale_O.split(size), strict=True)
        outs = [(compat.int8_linear(q_NI, q_OI) * scale_O).mul_(scale_N1).to(x_NI.dtype) for q_OI, scale_O in pieces]
        return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]
