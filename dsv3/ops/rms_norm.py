"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight, with the mean square taken in at least FP32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops import native


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its last dimension, weight [D]; returns x's dtype, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference_rms_norm` that keeps only x and one number per row for the backward pass.

    torch's kernel does on an accelerator; on a CPU torch composes it of parts that keep two FP32 copies of x.
    """
    if not x.is_cpu:
        return F.rms_norm(x, weight.shape, weight, eps)
    if (fast := native.rms_norm(x, weight, eps)) is not None:
        return fast
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        wide = grad.to(normed.dtype)
        d_weight = (wide * normed).reshape(-1, x.shape[-1]).sum(0)
        # With n = x * scale and g the gradient of n: dx = scale * (g - n * mean(g n)).
        g = wide * weight
        dx = torch.addcmul(g, normed, (g * normed).mean(-1, keepdim=True), value=-1).mul_(scale)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None
