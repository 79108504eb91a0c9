"""From logits to a distribution, and from a distribution to a token. Greedy is the distribution with one token.

Shapes: V vocabulary, R rows, K drafts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsv3.serve.params import SamplingParams


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution [..., V] (FP32, CPU) that `params` makes of logits [..., V]; one-hot when greedy.

    Knows temperature, top_k, top_p and min_p: what needs no history.
    """
    rows_RV = logits.reshape(-1, logits.shape[-1])
    return distributions(rows_RV, [params] * len(rows_RV)).view(logits.shape)


def distributions(logits_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The same of rows with parameters of their own, [R, V]."""
    logits_RV = logits_RV.float().cpu()
    if all(p.greedy for p in params):
        return torch.zeros_like(logits_RV).scatter_(-1, logits_RV.argmax(-1, keepdim=True), 1.0)
    # The largest logit becomes 0 before the division, which is by no zero of FP32: a tiny temperature is greedy.
    temperature_R1 = _column([p.temperature or 1.0 for p in params]).clamp_min(torch.finfo(torch.float32).tiny)
    probs_RV = ((logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R1).softmax(-1)
    if any(_truncates(p) for p in params):
        probs_RV = _truncated(probs_RV, params)
    if any(p.greedy for p in params):
        greedy_R1 = torch.tensor([[p.greedy] for p in params])
        one_hot_RV = torch.zeros_like(logits_RV).scatter_(-1, logits_RV.argmax(-1, keepdim=True), 1.0)
        probs_RV = torch.where(greedy_R1, one_hot_RV, probs_RV)
    return probs_RV


def _truncates(params: SamplingParams) -> bool:
    return not params.greedy and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)


def _truncated(probs_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The k likeliest tokens; of these, with their mass as the whole, the smallest set with mass top_p; of these, the
    ones not too unlikely beside the first. Among equals the lower index stays. What stays is normalised."""
    V = probs_RV.shape[-1]
    ordered_RV, index_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
    if any(p.top_k for p in params):
        top_k_R1 = torch.tensor([[min(p.top_k or V, V)] for p in params])
        ordered_RV = ordered_RV.masked_fill(torch.arange(V) >= top_k_R1, 0.0)
        ordered_RV = ordered_RV / _mass(ordered_RV)
    # A token stays if the mass before it is below top_p: the first always does.
    before_RV = ordered_RV.cumsum(-1) - ordered_RV
    top_p_R1 = _column([p.top_p for p in params]).clamp_min(torch.finfo(torch.float32).tiny)
    dropped_RV = (before_RV >= top_p_R1) & (top_p_R1 < 1)
    dropped_RV |= ordered_RV < ordered_RV[:, :1] * _column([p.min_p for p in params])
    ordered_RV = ordered_RV.masked_fill(dropped_RV, 0.0)
    return torch.zeros_like(probs_RV).scatter_(-1, index_RV, ordered_RV / _mass(ordered_RV))


def _mass(x_RV: Tensor) -> Tensor:
    """The sum of each row, [R, 1], added up in order: `sum` may change its order with the number of rows."""
    return x_RV.cumsum(-1)[:, -1:]


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row of probs [B, V]: int64 [B]."""
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def draw_at(probs_V: Tensor, seed: int, position: int) -> int:
    """A draw from probs [V] (CPU) that depends on nothing else than them, the seed and the position in the text.

    An exponential race: with independent e_i ~ Exp(1), the i of the least e_i / p_i comes first with probability p_i.
    The e_i belong to (seed, position), whoever draws: the model after any schedule, or an MTP module guessing ahead.
    So a draft is right if it is what the model would draw itself, and no text depends on what was drafted.
    Two races, of groups of tokens and inside the winning group, need noise for 2 sqrt(V) tokens only.
    """
    V = len(probs_V)
    size = math.isqrt(V - 1) + 1
    probs = np.zeros(size * size, dtype=np.float64)
    probs[:V] = probs_V.numpy()
    groups = probs.reshape(size, size)
    group = _race(groups.sum(1), seed, position, 0)
    return group * size + _race(groups[group], seed, position, 1 + group)


def _race(probs: np.ndarray, seed: int, position: int, number: int) -> int:
    noise = np.random.Generator(np.random.SFC64([seed % 2**64, position, number])).standard_exponential(len(probs))
    return int((probs / noise).argmax())


def verify_drafts(
    drafts: list[int], draft_probs_KV: Tensor, target_probs_KV: Tensor, generator: torch.Generator
) -> tuple[int, int]:
    """Exact speculative sampling (Leviathan et al. 2023): how many drafts stand, and the token that follows them.

    Draft k was drawn from q_k = draft_probs[k]; the model, having seen the drafts before it, wants p_k =
    target_probs[k]. Draft k stands with probability min(1, p/q); the first that falls is replaced by a draw from
    max(p - q, 0), normalised. target_probs has one row more than there are drafts: if all stand, the next token
    comes from that row. Whatever q is, the tokens that come out are distributed as p.
    """
    for k, token in enumerate(drafts):
        p, q = target_probs_KV[k, token], draft_probs_KV[k, token]
        if torch.rand((), generator=generator) * q < p:
            continue
        rest = (target_probs_KV[k] - draft_probs_KV[k]).clamp_min(0)
        if not rest.any():
            continue  # p and q are equal but for rounding: the draft stands
        return k, int(draw((rest / rest.sum()).unsqueeze(0), generator))
    return len(drafts), int(draw(target_probs_KV[len(drafts)].unsqueeze(0), generator))
