"""How fast a run computes, against what this device can do at all.

A share of a data sheet's peak says little on a CPU, or on a GPU that throttles. The yardstick here is the device's
own rate on one large matrix product in the run's dtype: the share is what a step loses to everything that is no such
product (small matrices, attention, norms, the optimizer, waiting).
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from dsv3.config import ModelConfig
from dsv3.plan.model import count_flops

_SMALLEST_CUBE, _LARGEST_CUBE = 512, 4096
_REPEATS = 3


@dataclass(frozen=True)
class Throughput:
    """Turns a step's time into rates. `gemm_rate`: FLOP/s of one large matrix product (see `measure_gemm_rate`)."""

    config: ModelConfig
    gemm_rate: float

    def metrics(self, sequences: int, seq_len: int, seconds: float, *, mtp: bool = True) -> dict[str, float]:
        """`gflops_per_second` of a step, and `gemm_share`, the same divided by `gemm_rate`."""
        rate = step_flops(self.config, sequences, seq_len, mtp=mtp) / seconds
        return {"gflops_per_second": rate / 1e9, "gemm_share": rate / self.gemm_rate}


def step_flops(config: ModelConfig, sequences: int, seq_len: int, *, mtp: bool = True) -> float:
    """FLOPs of the matrix products of one optimizer step, as `dsv3 plan model` counts them.

    Three times the forward pass, causal attention at half, recomputation not counted; with the MTP modules or not.
    """
    flops = count_flops(config, seq_len)
    return sequences * seq_len * (flops.training + (flops.mtp_training if mtp else 0.0))


def measure_gemm_rate(device: torch.device, dtype: torch.dtype, *, budget: float = 2.0) -> float:
    """FLOP/s of a square matrix product, median of a few, at the largest size up to 4096 that `budget` seconds allow.

    The sizes double from 512 on until the next would take longer than that; a slow device is not kept busy for minutes.
    """
    size = _SMALLEST_CUBE
    while True:
        times = _product_times(size, device, dtype)
        # Twice the size is eight times the work. The fastest time tells it best: a busy machine only ever adds.
        if size == _LARGEST_CUBE or 8 * min(times) * (_REPEATS + 1) > budget:
            return 2 * size**3 / statistics.median(times)
        size *= 2


def _product_times(size: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Seconds of each of a few [size, size] products, the first one, which warms up, left out."""
    # A generator of its own: measuring must not move the numbers that a model's weights are drawn from.
    generator = torch.Generator().manual_seed(size)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = []
    for _ in range(_REPEATS + 1):
        _synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return times[1:]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
