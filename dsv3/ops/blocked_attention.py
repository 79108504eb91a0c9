"""Attention on a CPU as plain matrix products, one block of queries after another.

torch's fused CPU kernel works in tiles too small for the CPU's matrix units, pads narrow values and multiplies what a
causal mask hides. Here a block of queries meets all keys that any of them may see in one batched product; its
probabilities are made again in the backward pass. Memory grows with the length of the sequence, not with its square.

Shapes: G = batch x heads, S queries, T keys (the queries are the last S of the T positions), K key width, V value
width, Q queries of one block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv3 import compat

_BLOCK_SCORES = 1 << 21  # scores of one block, of all heads: they should stay in the cache


def blocked_attention(q_BHSK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`ops.attention.reference_attention`: scores and softmax in at least FP32, products with values in v's dtype."""
    out: Tensor = _BlockedAttention.apply(q_BHSK, k_BHTK, v_BHTV, scale, mask)
    return out


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, mask):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        v_GTV = v.flatten(0, 1)
        out = v.new_empty(*q.shape[:3], v.shape[3])
        out_GSV = out.view(-1, *out.shape[2:])
        for rows, keys, scores_GQT in score_blocks(q, k, scale, mask, causal=mask is None):
            out_GSV[:, rows] = torch.bmm(scores_GQT.softmax(-1).to(v.dtype), v_GTV[:, keys])
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, mask = ctx.saved_tensors
        q_GSK, k_GTK, v_GTV, grad_GSV = (x.flatten(0, 1) for x in (q, k, v, grad))
        dq, dk, dv = torch.empty_like(q_GSK), torch.zeros_like(k_GTK), torch.zeros_like(v_GTV)
        for rows, keys, scores_GQT in score_blocks(q, k, ctx.scale, mask, causal=mask is None):
            probs_GQT = scores_GQT.softmax(-1)
            d_out_GQV = grad_GSV[:, rows].contiguous()
            dv[:, keys] += torch.bmm(probs_GQT.to(v.dtype).transpose(1, 2), d_out_GQV)
            d_probs_GQT = torch.bmm(d_out_GQV, v_GTV[:, keys].transpose(1, 2)).to(probs_GQT.dtype)
            d_scores_GQT = compat.softmax_backward(d_probs_GQT, probs_GQT).mul_(ctx.scale).to(q.dtype)
            dq[:, rows] = torch.bmm(d_scores_GQT, k_GTK[:, keys])
            dk[:, keys] += torch.bmm(d_scores_GQT.transpose(1, 2), q_GSK[:, rows])
        return dq.view_as(q), dk.view_as(k), dv.view_as(v), None, None


def score_blocks(
    q_BHSK: Tensor, k_BHTK: Tensor, scale: float, mask: Tensor | None, *, causal: bool
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries of a block, keys that they meet, their scores [G, Q, T'], -inf where they may not look), block by block.

    Scores are q . k * scale in at least FP32, to be overwritten at will. `causal`: the queries are the last S of the T
    positions and see nothing behind their own; else they see what `mask` says, or everything.
    """
    (B, H, S, _), T = q_BHSK.shape, k_BHTK.shape[2]
    dtype = torch.promote_types(q_BHSK.dtype, torch.float32)
    q_GSK, k_GTK = (q_BHSK.flatten(0, 1).to(dtype) * scale), k_BHTK.flatten(0, 1).to(dtype)
    size = max(32, min(256, _BLOCK_SCORES // max(1, B * H * T)))
    for start in range(0, S, size):
        rows = slice(start, min(start + size, S))
        keys = slice(0, T - S + rows.stop if causal else T)
        scores_GQT = torch.bmm(q_GSK[:, rows], k_GTK[:, keys].transpose(1, 2))
        if mask is not None:
            scores_GQT.view(B, H, -1, T).masked_fill_(~mask[..., rows, :], float("-inf"))
        elif causal:
            square = scores_GQT[..., T - S + start :]  # only the block's own positions can lie ahead of a query
            square += torch.full_like(square[0], float("-inf")).triu_(1)
        yield rows, keys, scores_GQT
