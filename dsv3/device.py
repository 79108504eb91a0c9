"""Where a model runs and in which dtype, decided once, from the hardware."""

from __future__ import annotations

import torch

from dsv3 import compat
from dsv3.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu. Raises `UserError` if the named device is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available.get(name, False):
        there = ", ".join(device for device, there in available.items() if there)
        raise UserError(f"device '{name}' is not available here; available: {there}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` takes BF16 on a GPU and on a CPU with BF16 matrix instructions, FP32 elsewhere."""
    if name == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and compat.cpu_has_bf16_gemm())
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
