"""From logits to a distribution, and from a distribution to a token. Greedy is the distribution with one token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. `temperature` 0 is greedy; `top_p` keeps the smallest set of tokens with that much mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf")):
            raise UserError(f"temperature is {self.temperature}, expected 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, expected a number in (0, 1]")

    def generator(self) -> torch.Generator:
        """A CPU generator: seeded, or fresh if `seed` is None. Draws are made on the CPU, so devices agree."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution [..., V] (FP32, CPU) that `params` makes of logits [..., V]; one-hot when greedy."""
    logits = logits.float().cpu()
    if params.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # The largest logit becomes 0 before the division, so that a tiny temperature cannot overflow.
    probs = ((logits - logits.amax(-1, keepdim=True)) / params.temperature).softmax(-1)
    if params.top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays if the mass before it is below top_p: the first always does.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= params.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row of probs [B, V]: int64 [B]."""
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


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
