"""Attention over a long context part by part, so that keys and values of one part exist at a time.

A softmax over all keys can be put together from softmaxes over parts of them. Part i gives its own output o_i and the
logarithm l_i of its sum of exponentials; the whole is o = sum_i exp(l_i - l) o_i with l = log sum_i exp(l_i), exactly.
The products are plain, on any device: torch's fused kernels keep their l_i to themselves.

Shapes: B batch, H heads, S queries, T keys of a part, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.ops.blocked_attention import score_blocks


@dataclass(frozen=True)
class Partial:
    """What queries have seen so far: their attention to it, and how much it weighs beside what they have not seen.

    A query that has seen nothing has an output of 0 and a log-sum-exp of -inf.
    """

    out_BHSV: Tensor  # FP32 at least
    lse_BHS: Tensor  # log sum_j exp(q . k_j * scale), FP32 at least


def reference_merge(partials: Sequence[Partial]) -> Partial:
    """sum_i exp(l_i - l) o_i, of parts that share no key. Every query has to see something."""
    lse_PBHS = torch.stack([partial.lse_BHS for partial in partials])
    out_PBHSV = torch.stack([partial.out_BHSV for partial in partials])
    return Partial((lse_PBHS.softmax(0).unsqueeze(-1) * out_PBHSV).sum(0), lse_PBHS.logsumexp(0))


def merge(first: Partial, second: Partial) -> Partial:
    """`reference_merge` of two. exp(l_2 - l) is sigmoid(l_2 - l_1), which cannot overflow."""
    share_BHS = (second.lse_BHS - first.lse_BHS).sigmoid().masked_fill(second.lse_BHS == float("-inf"), 0.0)
    out_BHSV = torch.lerp(first.out_BHSV, second.out_BHSV, share_BHS.unsqueeze(-1))
    return Partial(out_BHSV, torch.logaddexp(first.lse_BHS, second.lse_BHS))


def values_at_a_time(device: torch.device) -> int:
    """How many values to make of a long context at a time (keys and values, or scores), all heads together.

    On a CPU as many as its cache holds, 16 MiB in BF16: that is faster than the whole at once (a quarter of the time
    less at 16,384 tokens of preset bench-576). On a GPU 256 MiB: up to there the fused kernel takes the whole context.
    """
    return 2**23 if device.type == "cpu" else 2**27


def partial_attention(
    q_BHSK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, scale: float, mask: Tensor | None = None, *, causal: bool = False
) -> Partial:
    """Attention to these keys alone. Scores and softmax in at least FP32, products with values in v's dtype.

    `mask` is bool [B, 1 or H, S, T], True where a query may look; None: everywhere, or, with `causal`, up to its own
    position (the queries are the last S of the T positions).
    """
    dtype = torch.promote_types(q_BHSK.dtype, torch.float32)
    v_GTV = v_BHTV.flatten(0, 1)
    outs_GQV, lses_GQ = [], []
    for _, keys, scores_GQT in score_blocks(q_BHSK, k_BHTK, scale, mask, causal=causal):
        largest_GQ = scores_GQT.amax(-1)
        probs_GQT = scores_GQT.softmax(-1)
        # The largest probability is exp(its score - lse), and at least 1/T: cheaper than exponentials once more.
        lse_GQ = largest_GQ - probs_GQT.amax(-1).log()
        if mask is not None:
            blind_GQ = largest_GQ == float("-inf")
            probs_GQT = probs_GQT.masked_fill(blind_GQ.unsqueeze(-1), 0.0)
            lse_GQ = lse_GQ.masked_fill(blind_GQ, float("-inf"))
        outs_GQV.append(torch.bmm(probs_GQT.to(v_BHTV.dtype), v_GTV[:, keys]).to(dtype))
        lses_GQ.append(lse_GQ)
    shape = q_BHSK.shape[:2]
    return Partial(torch.cat(outs_GQV, dim=1).unflatten(0, shape), torch.cat(lses_GQ, dim=1).unflatten(0, shape))
