"""Rotary positions on the decoupled dimensions, and YaRN (spec section 3).

Two rules lose models when they are missed: the pairs are *interleaved*, (0,1), (2,3), ...; and under YaRN the
softmax scale grows by mscale^2. R is the RoPE width d_h^R; frequencies are FP32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv3.config import ModelConfig, RopeScaling
from dsv3.ops import native


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """[R/2] FP32: theta^(-2i/R), blended by YaRN with the same divided by s where a turn is longer than L0 allows."""
    R = config.qk_rope_head_dim
    plain = 1.0 / config.rope_theta ** (torch.arange(0, R, 2, dtype=torch.float32) / R)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    low, high = yarn_range(config, scaling)
    # 0 up to `low` (fast pairs keep their frequency), 1 from `high` on (slow pairs are stretched by s).
    stretched = ((torch.arange(R // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / scaling.factor * stretched + plain * (1 - stretched)


def yarn_range(config: ModelConfig, scaling: RopeScaling) -> tuple[int, int]:
    """(low, high): the pairs that make `beta_fast` and `beta_slow` turns within L0 tokens; (10, 23) for V3."""
    R = config.qk_rope_head_dim

    def pair_with(turns: float) -> float:
        length = scaling.original_max_position_embeddings / (2 * math.pi * turns)
        return R * math.log(length) / (2 * math.log(config.rope_theta))

    low = math.floor(pair_with(scaling.beta_fast))
    high = math.ceil(pair_with(scaling.beta_slow))
    return max(low, 0), min(high, R - 1)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """(d_h + d_h^R)^-0.5, times mscale^2 under YaRN: 0.1352337788608801 for V3."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= _mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def cos_sin(config: ModelConfig, inv_freq: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of positions x frequencies, each [*positions.shape, R/2] FP32, times YaRN's mscale ratio."""
    angles = positions.to(torch.float32).unsqueeze(-1) * inv_freq
    ratio = 1.0
    if (scaling := config.rope_scaling) is not None:
        ratio = _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return angles.cos() * ratio, angles.sin() * ratio


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_2i, x_2i+1) by its angle. x [..., R], cos and sin broadcastable to [..., R/2]; dtype of x."""
    if (fast := native.rotate(x, cos, sin)) is not None:
        return fast
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
