"""DeepSeekMoE: shared experts that every token visits, routed experts that the router chooses (eq. 12).

Shapes: T tokens, D model, E routed experts, K chosen per token, N rows grouped by expert (T*K and padding),
F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.model.router import Router, Routing
from dsv3.ops import native_prompts
from dsv3.ops.experts import grouped_swiglu, row_alignment
from dsv3.ops.recompute import recomputed
from dsv3.ops.rows import gather_rows, sum_rows
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

    def forward(self, rows_ND: Tensor, weights_N: Tensor, counts_E: Tensor) -> Tensor:
        return grouped_swiglu(rows_ND, weights_N, counts_E, self.gate_up_proj, self.down_proj)


@dataclass(frozen=True)
class Dispatched:
    """Token rows where their experts are, and what `combine` needs to bring the answers home.

    Rows know what their answers weigh: experts weigh their inner activation, so that a token's answers need only be
    summed, and no answer has to be kept for the gradient of its weight. A row of weight 0 is padding.
    """

    rows_ND: Tensor
    weights_N: Tensor
    counts_E: Tensor  # rows per expert
    tokens_N: Tensor  # int64, the token each row was taken from
    places_TK: Tensor  # int64, the row that serves each choice


class Dispatcher(Protocol):
    """Brings tokens to experts and answers back. Expert parallelism replaces it from outside the model."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched: ...

    def combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Tensor: ...


class LocalDispatcher:
    """All experts are here: dispatch is a sort by expert, combine its inverse and a sum. Drops no token."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        (T, K), E = routing.expert_ids_TK.shape, routing.scores_TE.shape[1]
        unit = row_alignment(x_TD, T * K, E)
        fast = native_prompts.group_rows(x_TD, routing.expert_ids_TK, routing.weights_TK, E, unit)
        if fast is not None:
            return Dispatched(*fast)
        order_N = routing.expert_ids_TK.flatten().argsort(stable=True)
        counts_E = torch.bincount(routing.expert_ids_TK.flatten(), minlength=E)
        tokens_N, rows_N = order_N // K, torch.arange(T * K, device=order_N.device)
        if unit > 1:
            aligned_E = (counts_E + unit - 1) // unit * unit
            shift_E = (aligned_E.cumsum(0) - aligned_E) - (counts_E.cumsum(0) - counts_E)
            rows_N = rows_N + shift_E.repeat_interleave(counts_E)
            # Padding is token 0 once more, at weight 0.
            tokens_N = order_N.new_zeros(int(aligned_E.sum())).index_copy_(0, rows_N, tokens_N)
            counts_E = aligned_E
        places_TK = torch.empty_like(order_N).index_copy_(0, order_N, rows_N).view(T, K)
        weights_TK = routing.weights_TK
        weights_N = weights_TK.new_zeros(tokens_N.shape).scatter(0, places_TK.flatten(), weights_TK.flatten())
        # With one choice per token (rows from other ranks) there are as many rows as tokens: no memory to be saved.
        gather = partial(recomputed, gather_rows) if K > 1 else gather_rows
        return Dispatched(gather(x_TD, tokens_N, places_TK), weights_N, counts_E, tokens_N, places_TK)

    def combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Tensor:
        return sum_rows(rows_ND, dispatched.tokens_N, dispatched.places_TK)


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
