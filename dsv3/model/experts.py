"""DeepSeekMoE: shared experts that every token visits, routed experts that the router chooses (eq. 12).

Shapes: T tokens, D model, E routed experts, K chosen per token, N = T*K rows grouped by expert, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.model.router import Router, Routing
from dsv3.ops.experts import grouped_swiglu
from dsv3.ops.recompute import recomputed
from dsv3.ops.swiglu import swiglu


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x); gate and up are one linear, gate rows first."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Experts(nn.Module):
    """The routed experts' weights, stacked, and their work on rows grouped by expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, F, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        return grouped_swiglu(rows_ND, counts_E, self.gate_up_proj, self.down_proj)


@dataclass(frozen=True)
class Dispatched:
    """Token rows where their experts are, and what `combine` needs to bring the answers home."""

    rows_ND: Tensor
    counts_E: Tensor  # rows per expert
    order_N: Tensor  # row n serves choice order[n] of the flattened [T, K] choices
    weights_TK: Tensor


class Dispatcher(Protocol):
    """Brings tokens to experts and answers back. Expert parallelism replaces it from outside the model."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched: ...

    def combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Tensor: ...


class LocalDispatcher:
    """All experts are here: dispatch is a sort by expert, combine its inverse and a weighted sum. Drops no token."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        order_N = routing.expert_ids_TK.flatten().argsort(stable=True)
        counts_E = torch.bincount(routing.expert_ids_TK.flatten(), minlength=routing.scores_TE.shape[1])
        top_k = routing.expert_ids_TK.shape[1]
        return Dispatched(recomputed(_Gather.apply, x_TD, order_N, top_k), counts_E, order_N, routing.weights_TK)

    def combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Tensor:
        out: Tensor = _Combine.apply(rows_ND, dispatched.weights_TK, dispatched.order_N)
        return out


class _Gather(torch.autograd.Function):
    """x[order // K]. Backward brings every choice's gradient home in choice order and sums over K: no scatter-add."""

    @staticmethod
    def forward(ctx, x_TD, order_N, top_k):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order_N)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_N // top_k)

    @staticmethod
    def backward(ctx, grad_ND):  # type: ignore[no-untyped-def]
        (order_N,) = ctx.saved_tensors
        return _to_choices(grad_ND, order_N, ctx.top_k).sum(1), None, None


class _Combine(torch.autograd.Function):
    """sum_k weight_tk * row of choice (t, k). Its gradient to the rows is a weighted dispatch."""

    @staticmethod
    def forward(ctx, rows_ND, weights_TK, order_N):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(rows_ND, weights_TK, order_N)
        choices_TKD = _to_choices(rows_ND, order_N, weights_TK.shape[1])
        return torch.bmm(weights_TK.to(rows_ND.dtype).unsqueeze(1), choices_TKD).squeeze(1)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        rows_ND, weights_TK, order_N = ctx.saved_tensors
        T, K = weights_TK.shape
        grad_ND = grad_TD.index_select(0, order_N // K)
        d_weights_N = (grad_ND * rows_ND).sum(-1, dtype=weights_TK.dtype)
        d_weights_TK = torch.empty_like(weights_TK).flatten().index_copy_(0, order_N, d_weights_N).view(T, K)
        weights_N1 = weights_TK.to(rows_ND.dtype).flatten()[order_N].unsqueeze(1)
        return grad_ND.mul_(weights_N1), d_weights_TK, None


def _to_choices(rows_ND: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """Rows grouped by expert, put back in the order of the choices: [T, K, D]."""
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    return rows_ND.index_select(0, inverse_N).view(-1, top_k, rows_ND.shape[-1])


class DeepSeekMoE(nn.Module):
    """Router, routed experts, shared experts; `Block` runs them stage by stage."""

    dispatcher: Dispatcher

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts: SwiGLU | None = None
        if config.n_shared_experts:
            # N_s shared experts of one width are one MLP of N_s times the width.
            self.shared_experts = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
        self.dispatcher = LocalDispatcher()
