"""Everything of PyTorch that is not a documented interface, in one place, guarded.

Each function works without the private symbol too (slower, or more cautious), so that a torch release that
moves one costs speed and not a crash.
"""

from __future__ import annotations

import torch
from torch import Tensor


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """grad * d silu(x)/dx in one pass over memory, rounded once."""
    op = getattr(torch.ops.aten, "silu_backward", None)
    if op is not None:
        out: Tensor = op(grad, x)
        return out
    dtype = torch.promote_types(x.dtype, torch.float32)
    sig = torch.sigmoid(x.to(dtype))
    return (grad.to(dtype) * sig * (1 + x.to(dtype) * (1 - sig))).to(x.dtype)


def softmax_backward(grad: Tensor, probs: Tensor) -> Tensor:
    """Gradient of a softmax over the last dimension with respect to its input, given `probs`, what it made."""
    op = getattr(torch.ops.aten, "_softmax_backward_data", None)
    if op is not None:
        out: Tensor = op(grad, probs, -1, probs.dtype)
        return out
    return probs * (grad - (grad * probs).sum(-1, keepdim=True))


def cpu_has_bf16_gemm() -> bool:
    """Whether this CPU multiplies BF16 matrices in hardware (AMX or AVX512-BF16), where BF16 compute pays."""
    probes = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return any(probe is not None and probe() for probe in probes)


def cpu_has_amx() -> bool:
    """Whether this CPU has matrix units, which oneDNN uses."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and bool(probe())


def can_pack_weights() -> bool:
    """Whether this torch lets a linear map's weight be laid out for oneDNN ahead of time."""
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")) and bool(
        torch.backends.mkldnn.is_available()
    )


def pack_linear_weight(weight_OI: Tensor) -> Tensor:
    """The weight in oneDNN's own layout, opaque. Needs `can_pack_weights()`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 32)  # laid out with 32 rows in mind
    return packed


def packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    """x W^T for a weight of `pack_linear_weight`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return out


def cpu_has_int8_gemm() -> bool:
    """Whether torch can multiply int8 by int8 on this CPU. Without VNNI pairs of products could saturate at 16 bits."""
    probe = getattr(torch.cpu, "_is_vnni_supported", None)
    return hasattr(torch, "_int_mm") and probe is not None and bool(probe())


def int8_linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T in int32, exactly, of two int8. Needs `cpu_has_int8_gemm()`."""
    out: Tensor = torch._int_mm(x_NI, weight_OI.t())
    return out
