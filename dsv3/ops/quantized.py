"""Weights of 8 and 4 bits for inference on a CPU: decoding reads every weight for a few tokens, so bytes are its time.

Three kinds, each the product with its own dequantised weight, up to the rounding of the result:

- `Int8Weight`: int8 with one scale for each output; activations stay BF16. A byte a weight.
- `Int4Weight`: 4 bits with a scale and a zero for each 32 inputs of an output; activations stay BF16. 5 bits a weight.
- `Int8DynamicWeight`: `Int8Weight`'s numbers, and of many rows activations rounded to int8 with one scale for each row,
  so that the product is one of integers. A byte a weight.

A few rows go to our own kernel, which reads the integers as they lie and makes the rows integers too, finer than BF16:
16 bits with one scale for each row. Many rows meet a piece of the weight after the other in BF16, so that no second
copy is kept.

Shapes: N rows, I inputs, O outputs of a linear map, G groups of inputs.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3 import compat
from dsv3.ops import native, native_prompts
from dsv3.ops.native import Stored
from dsv3.ops.packed import LinearWeight

GROUP = 32
_PIECE = 2**19  # weights that are brought into another form at a time: they stay in the cache


def quantize_rows(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [N, I] of -127 to 127, scale [N, 1] in FP32) with x about their product."""
    limit_N1 = x_NI.abs().amax(dim=-1, keepdim=True).float()
    scale_N1 = (limit_N1 / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (x_NI / scale_N1).round_().clamp_(-127, 127).to(torch.int8), scale_N1


def quantize_groups(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(uint8 [O, I] of 0 to 15, scale [O, G], zero [O, G], BF16): w about (q - 8) scale + zero.

    Each group's 16 steps reach from its least to its greatest weight. I is a multiple of `GROUP`.
    """
    groups_OGI = weight_OI.float().unflatten(-1, (-1, GROUP))
    low_OG, high_OG = groups_OGI.amin(-1), groups_OGI.amax(-1)
    scale_OG = ((high_OG - low_OG) / 15).clamp_min(torch.finfo(torch.float32).tiny).bfloat16()
    zero_OG = (low_OG + 8 * scale_OG.float()).bfloat16()
    steps_OGI = (groups_OGI - zero_OG.float().unsqueeze(-1)) / scale_OG.float().unsqueeze(-1)
    return steps_OGI.round_().add_(8).clamp_(0, 15).to(torch.uint8).flatten(-2), scale_OG, zero_OG


def dequantize_groups(q_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    """The weight [O, I] in FP32 that the integers of `quantize_groups` stand for."""
    steps_OGI = (q_OI.float() - 8).unflatten(-1, (-1, GROUP))
    return (steps_OGI * scale_OG.float().unsqueeze(-1) + zero_OG.float().unsqueeze(-1)).flatten(-2)


class QuantizedWeight(LinearWeight):
    """A weight, quantised; takes BF16 activations."""

    _few_rows = 64  # up to there our own kernel is faster than turning the weight into BF16 first

    rounds_activations = False  # those of many rows

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    @classmethod
    def of(cls, weight_OI: Tensor) -> QuantizedWeight:
        """Of a weight in BF16."""
        return cls(cls.quantize(weight_OI).in_large_pages())

    @staticmethod
    @abstractmethod
    def quantize(weight_OI: Tensor) -> Stored:
        """Of a weight in BF16."""

    @staticmethod
    def available() -> bool:
        """Whether this torch and this CPU can multiply by such weights."""
        return True

    @staticmethod
    @abstractmethod
    def fits(num_outputs: int, num_inputs: int) -> bool:
        """Whether a weight of this shape can be quantised so."""

    def in_memory(self) -> Stored | None:
        """As in `LinearWeight`."""
        return self._stored if self._stored.is_taken else None

    def multiply(self, x_NI: Tensor) -> Tensor:
        """As in `LinearWeight`."""
        few = len(x_NI) <= self._few_rows
        if few or not self.rounds_activations:
            fast = (native.linear if few else native_prompts.linear)(x_NI, self._stored)
            if fast is not None:
                return fast
        pieces = self._stored.split(max(1, _PIECE // x_NI.shape[1]))
        outs = self._by_pieces(x_NI, pieces)
        return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]

    @abstractmethod
    def _by_pieces(self, x_NI: Tensor, pieces: list[Stored]) -> list[Tensor]:
        """The outputs of each piece of the weight, in x's dtype."""


class Int8Weight(QuantizedWeight):
    """int8, one scale for each output."""

    @staticmethod
    def quantize(weight_OI: Tensor) -> Stored:
        q_OI, scale_O1 = quantize_rows(weight_OI)
        return Stored(q_OI, scale_O1.squeeze(-1), weight_OI.shape[-1])

    @staticmethod
    def fits(num_outputs: int, num_inputs: int) -> bool:
        return True

    def _by_pieces(self, x_NI: Tensor, pieces: list[Stored]) -> list[Tensor]:
        return [F.linear(x_NI, piece.weight.to(x_NI.dtype)).mul_(_scale(piece)) for piece in pieces]


class Int8DynamicWeight(Int8Weight):
    """int8, one scale for each output, and activations in int8, one scale for each row."""

    _few_rows = 32
    rounds_activations = True

    @staticmethod
    def available() -> bool:
        return compat.cpu_has_int8_gemm()

    @staticmethod
    def fits(num_outputs: int, num_inputs: int) -> bool:
        return num_inputs % 16 == 0

    def _by_pieces(self, x_NI: Tensor, pieces: list[Stored]) -> list[Tensor]:
        q_NI, scale_N1 = quantize_rows(x_NI)
        products = (compat.int8_linear(q_NI, piece.weight) * _scale(piece) for piece in pieces)
        return [product.mul_(scale_N1).to(x_NI.dtype) for product in products]


def _scale(stored: Stored) -> Tensor:
    assert stored.scale is not None, "int8 has one"
    return stored.scale


class Int4Weight(QuantizedWeight):
    """4 bits, a scale and a zero for each group of inputs of an output; laid out as `kernels/maps.h` has them."""

    @staticmethod
    def quantize(weight_OI: Tensor) -> Stored:
        q_OI, scale_OG, zero_OG = quantize_groups(weight_OI)
        pairs = q_OI.unflatten(-1, (-1, 2, GROUP))
        halves = (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2)
        scales = torch.stack((scale_OG, zero_OG), dim=-1).flatten(-2).view(torch.uint8)
        return Stored(torch.cat((halves, scales), dim=-1), None, weight_OI.shape[-1])

    @staticmethod
    def fits(num_outputs: int, num_inputs: int) -> bool:
        return num_inputs % (2 * GROUP) == 0

    def _by_pieces(self, x_NI: Tensor, pieces: list[Stored]) -> list[Tensor]:
        return [F.linear(x_NI, dequantize_int4(piece).to(x_NI.dtype)) for piece in pieces]


def dequantize_int4(stored: Stored) -> Tensor:
    """The weight [O, I] in FP32 of what `Int4Weight.quantize` gave."""
    halves, scales = stored.weight.split((stored.num_inputs // 2, stored.num_inputs // GROUP * 4), dim=-1)
    pairs = halves.unflatten(-1, (-1, GROUP))
    q_OI = torch.stack((pairs & 15, pairs >> 4), dim=-2).flatten(-3)
    scale_OG, zero_OG = scales.contiguous().view(torch.bfloat16).unflatten(-1, (-1, 2)).unbind(-1)
    return dequantize_groups(q_OI, scale_OG, zero_OG)
