"""Softmax attention over keys and values (expanded), or over MLA's latents themselves (absorbed).

Shapes: B batch, S queries, T keys (the S queries are the last S of the T positions), H heads, K query/key
width, V value width, N = K without RoPE, R RoPE width, C latent width, X = C + R; t = B * S and s = S * H flattened.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops import native, native_prompts
from dsv3.ops.blocked_attention import blocked_attention
from dsv3.ops.latents import Latents
from dsv3.ops.partial_attention import Partial, partial_attention
from dsv3.ops.recompute import recomputed


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[S, T] bool, True where query i (at position T - S + i) may look at key j <= that position."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def reference_attention(q_BHSK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """o_i = sum_j softmax_j(q_i . k_j * scale) v_j (eq. 10), softmax in at least FP32. Returns [B, H, S, V].

    `mask` is bool, broadcastable to [B, H, S, T], True where a query may look; None means causal.
    """
    dtype = torch.promote_types(q_BHSK.dtype, torch.float32)
    if mask is None:
        mask = causal_mask(q_BHSK.shape[2], k_BHTK.shape[2], q_BHSK.device)
    scores = (q_BHSK.to(dtype) @ k_BHTK.to(dtype).transpose(2, 3)) * scale
    probs = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (probs @ v_BHTV.to(dtype)).to(q_BHSK.dtype)


def attention(q_BHSK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`reference_attention`, fast: through torch's fused kernels, or on a CPU in blocks of queries.

    The fused kernels are 2-3 times faster when the value is as wide as the key, so a narrower value is padded with
    zeros and the padding cut off again: zeros times probabilities are zeros.
    """
    if q_BHSK.is_cpu:
        return blocked_attention(q_BHSK, k_BHTK, v_BHTV, scale, mask)
    S, T = q_BHSK.shape[2], k_BHTK.shape[2]
    width = v_BHTV.shape[-1]
    v = recomputed(F.pad, v_BHTV, (0, k_BHTK.shape[-1] - width)) if width < k_BHTK.shape[-1] else v_BHTV
    causal = mask is None and S == T
    if mask is None and not causal and S > 1:
        mask = causal_mask(S, T, q_BHSK.device)
    # `scale` must be passed: the default forgets YaRN's mscale^2 (spec section 3).
    out = F.scaled_dot_product_attention(q_BHSK, k_BHTK, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out[..., :width]


def expanded_attention(
    q_nope_BSHN: Tensor,
    q_rope_BSHR: Tensor,
    k_nope_BTHN: Tensor,
    k_rope_BTR: Tensor,
    v_BTHV: Tensor,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """`attention` with queries and keys as MLA has them, in two parts, one of the keys' of all heads. [B, S, H, V]."""
    inputs = (q_nope_BSHN, q_rope_BSHR, k_nope_BTHN, k_rope_BTR, v_BTHV)
    fast = native_prompts.expanded_attention(*inputs, scale, causal=True) if mask is None else None
    if fast is not None:
        return fast[0]
    return attention(*_whole(*inputs), scale, mask).transpose(1, 2)


def expanded_partial(
    q_nope_BSHN: Tensor,
    q_rope_BSHR: Tensor,
    k_nope_BTHN: Tensor,
    k_rope_BTR: Tensor,
    v_BTHV: Tensor,
    scale: float,
    mask: Tensor | None,
    *,
    causal: bool,
) -> Partial:
    """`partial_attention` with the same."""
    inputs = (q_nope_BSHN, q_rope_BSHR, k_nope_BTHN, k_rope_BTR, v_BTHV)
    fast = native_prompts.expanded_attention(*inputs, scale, causal=causal) if mask is None else None
    if fast is not None:
        return Partial(fast[0].transpose(1, 2).float(), fast[1])
    return partial_attention(*_whole(*inputs), scale, mask, causal=causal)


def _whole(
    q_nope_BSHN: Tensor, q_rope_BSHR: Tensor, k_nope_BTHN: Tensor, k_rope_BTR: Tensor, v_BTHV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, S, K], keys [B, H, T, K] and values [B, H, T, V]."""
    k_rope_BTHR = k_rope_BTR.unsqueeze(2).expand(-1, -1, k_nope_BTHN.shape[2], -1)
    q_BHSK, k_BHTK = (
        recomputed(_join_by_head, nope, rope) for nope, rope in ((q_nope_BSHN, q_rope_BSHR), (k_nope_BTHN, k_rope_BTHR))
    )
    return q_BHSK, k_BHTK, v_BTHV.transpose(1, 2)


def _join_by_head(nope_BSHN: Tensor, rope_BSHR: Tensor) -> Tensor:
    return torch.cat((nope_BSHN.transpose(1, 2), rope_BSHR.transpose(1, 2)), dim=-1)


def absorbed_attention(
    q_nope_BSHN: Tensor,
    q_rope_BSHR: Tensor,
    latents: Latents,
    up_HMC: Tensor,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """The same attention with W_UK moved to the query and W_UV behind the sum, so that no key or value is made.

    q . k = (q_nope W_UK) . c + q_rope . k_rope, and sum_j p_j (W_UV c_j) = W_UV (sum_j p_j c_j): equal functions,
    other order of products. A latent is c and k_rope side by side, and to a query of all heads it is one key (and its
    first part one value). Worth it when the queries are few. up_HMC: of each head W_UK [N, C], then
    W_UV [V, C], so M = N + V. Returns [B, S, H, V].
    """
    if (fast := native.latent_attention(q_nope_BSHN, q_rope_BSHR, latents, up_HMC, scale, mask)) is not None:
        return fast
    latents_BTX, N = latents.side_by_side(), q_nope_BSHN.shape[-1]
    w_uk_HNC, w_uv_HVC = up_HMC.split((N, up_HMC.shape[1] - N), dim=1)
    B, S, H, _ = q_nope_BSHN.shape
    dtype = torch.promote_types(latents_BTX.dtype, torch.float32)
    q_HtC = torch.bmm(q_nope_BSHN.flatten(0, 1).transpose(0, 1), w_uk_HNC)
    q_BSHX = torch.cat((q_HtC.unflatten(1, (B, S)).permute(1, 2, 0, 3), q_rope_BSHR), dim=-1)
    # Latents first: a CPU is slow with the long matrix transposed.
    scores_BsT = torch.bmm(latents_BTX, q_BSHX.flatten(1, 2).transpose(1, 2)).transpose(1, 2).to(dtype) * scale
    if mask is None and S > 1:
        mask = causal_mask(S, latents_BTX.shape[1], latents_BTX.device)[None, None]
    if mask is not None:
        scores_BSHT = scores_BsT.unflatten(1, (S, H)).masked_fill(~mask.transpose(1, 2), float("-inf"))
        scores_BsT = scores_BSHT.flatten(1, 2)
    probs_BsT = scores_BsT.softmax(-1).to(latents_BTX.dtype)
    # Whole latents, of which k_rope's part is thrown away: without it a CPU would copy them.
    out_BsC = torch.bmm(probs_BsT, latents_BTX)[..., : w_uk_HNC.shape[2]]
    out_HtC = out_BsC.unflatten(1, (S, H)).flatten(0, 1).transpose(0, 1)
    return torch.bmm(out_HtC, w_uv_HVC.transpose(1, 2)).transpose(0, 1).unflatten(0, (B, S))
