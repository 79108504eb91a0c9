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


def has_int8_weight_gemm() -> bool:
    """Whether this torch multiplies by int8 weights."""
    return hasattr(torch.ops.aten, "_weight_int8pack_mm")


def int8_weight_linear(x_NI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """x (weight * scale)^T in x's dtype, which is the scale's; the weight int8. Needs `has_int8_weight_gemm()`.

    I must be a multiple of 16: the kernel does not check, skips the rest and reads past the end.
    """
    out: Tensor = torch.ops.aten._weight_int8pack_mm(x_NI, weight_OI, scale_O)
    return out


def has_int4_weight_gemm() -> bool:
    """Whether this torch multiplies by int4 weights on a CPU."""
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    return all(hasattr(torch.ops.aten, name) for name in names)


def pack_int4_weight(weight_OI: Tensor) -> Tensor:
    """Integers from 0 to 15 (int32), two to a byte in the order of this CPU's kernel. O a multiple of 16."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight_OI, 1)
    return packed


def int4_weight_linear(x_NI: Tensor, packed: Tensor, group: int, scale_and_zero_GO2: Tensor) -> Tensor:
    """x ((w - 8) * scale + zero)^T in x's dtype, which is the scales'; G = I / group groups, of at least 32."""
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_NI, packed, group, scale_and_zero_GO2)
    return out


def cpu_has_int8_gemm() -> bool:
    """Whether torch can multiply int8 by int8 on this CPU. Without VNNI pairs of products could saturate at 16 bits."""
    probe = getattr(torch.cpu, "_is_vnni_supported", None)
    return hasattr(torch, "_int_mm") and probe is not None and bool(probe())


def int8_linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T in int32, exactly, of two int8. Needs `cpu_has_int8_gemm()`."""
    out: Tensor = torch._int_mm(x_NI, weight_OI.t())
    return out
