"""Tokens to rows and back: every row is a copy of a token for one of its choices. Each map is the other's gradient.

Shapes: T tokens, K choices of each, N rows, D width. tokens_N: the token that each row is a copy of. places_TK: the row
that serves each choice, -1 where none does. A row that serves no choice (padding) is read by nobody.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.ops import native_prompts


def gather_rows(x_TD: Tensor, tokens_N: Tensor, places_TK: Tensor, *, all_served: bool = True) -> Tensor:
    """[N, D]: x[tokens]. Its gradient is `sum_rows`. `all_served` promises that no place is -1."""
    if not torch.is_grad_enabled():
        return x_TD.index_select(0, tokens_N)
    out: Tensor = _Gather.apply(x_TD, tokens_N, places_TK, all_served)
    return out


def sum_rows(rows_ND: Tensor, tokens_N: Tensor, places_TK: Tensor, *, all_served: bool = True) -> Tensor:
    """[T, D]: the rows of each token's choices, added up in the order of the choices. Its gradient is `gather_rows`.

    Padding gets a gradient as if it served token `tokens_N`; whoever pads must see to it that this goes nowhere.
    """
    if not torch.is_grad_enabled():
        return _sum(rows_ND, places_TK, all_served)
    out: Tensor = _Sum.apply(rows_ND, tokens_N, places_TK, all_served)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, tokens_N, places_TK, all_served):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(places_TK)
        ctx.all_served = all_served
        return x_TD.index_select(0, tokens_N)

    @staticmethod
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        (places_TK,) = ctx.saved_tensors
        return _sum(grad_ND, places_TK, ctx.all_served), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, tokens_N, places_TK, all_served):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tokens_N)
        return _sum(rows_ND, places_TK, all_served)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        (tokens_N,) = ctx.saved_tensors
        return grad_TD.index_select(0, tokens_N), None, None, None


def _sum(rows_ND: Tensor, places_TK: Tensor, all_served: bool) -> Tensor:
    """Reads each choice's row: no scatter-add, whose order, and with it rounding, would change from run to run."""
    (T, K), D = places_TK.shape, rows_ND.shape[1]
    if not rows_ND.shape[0]:
        return rows_ND.new_zeros(T, D)
    if all_served:
        if (fast := native_prompts.sum_rows(rows_ND, places_TK)) is not None:
            return fast
        return rows_ND.index_select(0, places_TK.flatten()).view(T, K, D).sum(1)
    choices_TKD = rows_ND.index_select(0, places_TK.clamp_min(0).flatten()).view(T, K, D)
    return choices_TKD.masked_fill_(places_TK.unsqueeze(2) < 0, 0).sum(1)
