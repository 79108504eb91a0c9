"""FP8 E4M3 weights with one FP32 scale per 128x128 block, as DeepSeek-V3 is released (report 3.3.2).

E4M3 has 4 significant bits and ends at 448, so a whole matrix under one scale would lose its small entries;
a block of 128x128 keeps an outlier's harm local. The scale is stored as `weight_scale_inv` and, despite that
name, is the *multiplier* that gives the weight back. A matrix whose sides are no multiples of 128 has partial
last blocks.

Shapes: N rows, K columns; n = ceil(N/128), k = ceil(K/128) blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4  # spec section 10: keeps the scale of an all-zero block away from zero


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(n, k), the shape of the scales of a weight of shape (N, K)."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantize_blocks(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K], any floating dtype -> (q_NK float8_e4m3fn, scale_nk FP32) with w ~ q * scale block by block.

    scale = max(amax, 1e-4) / 448. A NaN or infinity in w shows as a non-finite scale of its block.
    """
    blocks = _blocks(w_NK.float())
    # Large weights: what these lines cost is fresh memory, so |w| is never made and the clamp is in place.
    amax_nk = torch.maximum(blocks.amax(dim=(1, 3)), -blocks.amin(dim=(1, 3)))
    scale_nk = amax_nk.clamp(min=AMAX_FLOOR) / E4M3_MAX
    # Clamp before the cast: rounding may carry the largest entry past 448, and E4M3 turns that into NaN.
    scaled = (blocks / scale_nk[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    return _unblocks(scaled.to(torch.float8_e4m3fn), w_NK.shape), scale_nk


def dequantize_blocks(q_NK: Tensor, scale_nk: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q * scale block by block, multiplied in FP32 and rounded once to `dtype`; [N, K]."""
    blocks = _blocks(q_NK.to(torch.float32, copy=True)).mul_(scale_nk.float()[:, None, :, None])
    return _unblocks(blocks, q_NK.shape).to(dtype)


def _blocks(w_NK: Tensor) -> Tensor:
    """[N, K] -> [n, 128, k, 128], padded with zeros; a view where nothing needs padding."""
    rows, columns = w_NK.shape
    n, k = scale_shape((rows, columns))
    if (rows, columns) != (n * BLOCK, k * BLOCK):
        w_NK = F.pad(w_NK, (0, k * BLOCK - columns, 0, n * BLOCK - rows))
    return w_NK.reshape(n, BLOCK, k, BLOCK)


def _unblocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_blocks`: [n, 128, k, 128] -> [N, K]."""
    rows, columns = shape
    padded = blocks.reshape(blocks.shape[0] * BLOCK, blocks.shape[2] * BLOCK)
    return padded[:rows, :columns].contiguous()
