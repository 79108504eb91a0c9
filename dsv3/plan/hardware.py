"""The GPUs a plan can name: capacity, peak rates and links, as their makers state them.

Peaks are *dense* (data sheets print twice that, "with sparsity"), with FP32 accumulation. Link rates are per GPU
and per direction; data sheets add both directions up. What a program reaches is lower: plans multiply a peak by
an efficiency that they name, and take the effective NVLink rate where one was published.

Sources: NVIDIA data sheets of A100 80GB SXM, H100 SXM, H200 SXM, HGX B200, GB200 NVL72 and L40S; the Ada and RTX
Blackwell architecture white papers for RTX 4090 and RTX 5090. H800: no data sheet is published; its compute and
memory are an H100's, its NVLink is 400 GB/s in both directions, of which 160 GB/s one way is usable beside
InfiniBand at 50 GB/s (DeepSeek-V3 report, section 3.2.2). H20: as listed by vendors, no public data sheet. The
network is how such nodes are commonly built: an adapter of 400 Gb/s per GPU, 200 with A100 and L40S, 100 with
GeForce cards; replace it (`dataclasses.replace`) by what yours have.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3.errors import UserError
from dsv3.plan.display import GIB


@dataclass(frozen=True)
class GPU:
    """One GPU and its share of the node: rates in FLOP/s and bytes/s."""

    name: str
    memory_gib: float  # what nvidia-smi reports is within 1 % of the marketing number read as GiB
    bf16_flops: float
    fp8_flops: float | None  # None: no FP8 tensor cores
    memory_bandwidth: float
    nvlink_bandwidth: float  # one way to the other GPUs of the node; PCIe where there is no NVLink
    network_bandwidth: float  # one way out of the node, this GPU's share
    gpus_per_node: int = 8

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB

    def peak_flops(self, precision: str) -> float:
        """Dense peak of matrix products in "bf16" or "fp8" (FLOP/s)."""
        if precision == "bf16":
            return self.bf16_flops
        if precision == "fp8":
            if self.fp8_flops is None:
                raise UserError(f"{self.name} has no FP8 tensor cores: plan with bf16, or with a Hopper or later GPU")
            return self.fp8_flops
        raise UserError(f"precision '{precision}' has no tensor-core peak here: give 'bf16' or 'fp8'")


GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU("A100-80GB", 80, 312e12, None, 2.039e12, 300e9, 25e9),
        GPU("H100", 80, 989.4e12, 1978.9e12, 3.35e12, 450e9, 50e9),
        GPU("H800", 80, 989.4e12, 1978.9e12, 3.35e12, 160e9, 50e9),
        GPU("H200", 141, 989.4e12, 1978.9e12, 4.8e12, 450e9, 50e9),
        GPU("H20", 96, 148e12, 296e12, 4.0e12, 450e9, 50e9),
        GPU("B200", 180, 2250e12, 4500e12, 7.7e12, 900e9, 50e9),
        GPU("GB200", 186, 2500e12, 5000e12, 8.0e12, 900e9, 50e9, gpus_per_node=72),
        GPU("L40S", 48, 362.05e12, 733e12, 0.864e12, 32e9, 25e9),
        GPU("RTX-4090", 24, 165.2e12, 330.3e12, 1.008e12, 32e9, 12.5e9),
        GPU("RTX-5090", 32, 209.5e12, 419e12, 1.792e12, 64e9, 12.5e9),
    )
}


def find_gpu(name: str) -> GPU:
    """The GPU called `name`; case, spaces and hyphens do not matter. Raises `UserError` listing what is known."""

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    for gpu in GPUS.values():
        if plain(gpu.name) == plain(name):
            return gpu
    raise UserError(f"there is no GPU '{name}' in the table; choose one of {', '.join(GPUS)}")
