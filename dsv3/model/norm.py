"""RMSNorm as a module; its output is never kept if the backward pass may make it again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv3.ops.recompute import recomputed
from dsv3.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; returns x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(rms_norm, x, self.weight, self.eps)
