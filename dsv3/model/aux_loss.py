"""The complementary sequence-wise balance loss (eq. 17-20), and how it reaches the gradient.

Shapes: B sequences, S tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_balance_loss(scores_BSE: Tensor, top_k: int, valid_BS: Tensor | None = None) -> Tensor:
    """sum_i f_i P_i of each sequence (eq. 17-20 without alpha), [B]; 1 when perfectly balanced.

    f_i counts the tokens that have expert i in the top K of their *unbiased, ungrouped* scores, times E / (K S);
    it carries no gradient. P_i is the mean over tokens of s_i / sum_j s_j; it does. Padding takes no part.
    """
    E = scores_BSE.shape[-1]
    chosen_BSE = torch.zeros_like(scores_BSE)
    chosen_BSE.scatter_(-1, scores_BSE.detach().topk(top_k, dim=-1).indices, 1.0)
    share_BSE = scores_BSE / (scores_BSE.sum(-1, keepdim=True) + 1e-20)  # scores may all underflow
    if valid_BS is None:
        length_B1: Tensor | int = scores_BSE.shape[1]
    else:
        chosen_BSE = chosen_BSE * valid_BS.unsqueeze(-1)
        share_BSE = share_BSE * valid_BS.unsqueeze(-1)
        length_B1 = valid_BS.sum(1, keepdim=True).clamp_min(1)
    f_BE = chosen_BSE.sum(1) * (E / top_k) / length_B1
    P_BE = share_BSE.sum(1) / length_B1
    return (f_BE * P_BE).sum(-1)


def inject_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x unchanged; in the backward pass `loss` gets gradient 1, as if it had been added to what is minimised.

    So an auxiliary loss deep in a model reaches the optimizer through any pipeline, without a return value.
    """
    out: Tensor = _InjectLoss.apply(x, loss)
    return out


class _InjectLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):  # type: ignore[no-untyped-def]
        ctx.like = (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        dtype, device = ctx.like
        return grad, torch.ones((), dtype=dtype, device=device)
