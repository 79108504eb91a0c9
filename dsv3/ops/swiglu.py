"""SwiGLU on a fused pre-activation: silu(gate) * up, with gate and up side by side in the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3 import compat
from dsv3.ops.recompute import recomputed


def reference_swiglu(h: Tensor) -> Tensor:
    """silu(h[..., :F]) * h[..., F:] for h [..., 2F]; returns [..., F]."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu(h: Tensor) -> Tensor:
    """`reference_swiglu` that keeps only h for its backward pass."""
    return recomputed(_SwiGLU.apply, h) if torch.is_grad_enabled() else _swiglu(h)


def weighted_swiglu(h_NG: Tensor, weights_N: Tensor) -> Tensor:
    """swiglu(h) times one weight per row (cast to h's dtype), that keeps only h and the weights. Returns [N, G/2]."""
    if not torch.is_grad_enabled():
        return _swiglu(h_NG).mul_(weights_N.to(h_NG.dtype).unsqueeze(1))
    return recomputed(_WeightedSwiGLU.apply, h_NG, weights_N)


def swiglu_backward(h: Tensor, grad: Tensor) -> Tensor:
    """Gradient of `swiglu` with respect to h, given the gradient [..., F] of its output; no graph is recorded."""
    gate, up = h.chunk(2, dim=-1)
    out = torch.empty_like(h)
    d_gate, d_up = out.chunk(2, dim=-1)
    torch.mul(F.silu(gate), grad, out=d_up)
    d_gate.copy_(compat.silu_backward(grad * up, gate))
    return out


def weighted_swiglu_backward(h: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The same of `weighted_swiglu`: gradients of h and of the weights."""
    d_weights = (swiglu(h) * grad).sum(-1, dtype=weights.dtype)
    return swiglu_backward(h, grad * weights.to(h.dtype).unsqueeze(1)), d_weights


def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(h)
        return _swiglu(h)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (h,) = ctx.saved_tensors
        return swiglu_backward(h, grad)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weights):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(h, weights)
        return _swiglu(h).mul_(weights.to(h.dtype).unsqueeze(1))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        h, weights = ctx.saved_tensors
        return weighted_swiglu_backward(h, weights, grad)
