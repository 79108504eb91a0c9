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


def cpu_has_bf16_gemm() -> bool:
    """Whether this CPU multiplies BF16 matrices in hardware (AMX or AVX512-BF16), where BF16 compute pays."""
    probes = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return any(probe is not None and probe() for probe in probes)
