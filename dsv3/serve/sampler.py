"""The next token of every row of a step: what has a history is adjusted row by row, everything else at once.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.ops import native
from dsv3.serve.outputs import Token
from dsv3.serve.params import SamplingParams
from dsv3.serve.sampling import distributions, draw_at


@dataclass(frozen=True)
class Row:
    """One position whose output chooses a token."""

    params: SamplingParams
    position: int  # of the chosen token in its text
    prompt: Sequence[int] = ()  # these two matter to penalties alone
    output: Sequence[int] = ()
    banned: Sequence[int] = ()  # tokens that would end the text too early
    allowed_V: Tensor | None = None  # bool, by the grammar


NOT_A_NUMBER = -1  # instead of a token, where the logits are broken


def choose(logits_RV: Tensor, rows: Sequence[Row]) -> list[int]:
    """A token for each row. Depends on the row alone: not on its neighbours, nor on when it is computed."""
    tokens = native.greedy(logits_RV)
    if tokens is None:
        largest_R, argmax_R = logits_RV.max(-1)
        tokens = argmax_R.where(largest_R.isfinite(), NOT_A_NUMBER).tolist()
    if all(row.params.greedy and not _adjusts(row) for row in rows):
        return tokens
    sound = [index for index, token in enumerate(tokens) if token != NOT_A_NUMBER]
    for index, token in zip(sound, _choose(logits_RV[sound], [rows[index] for index in sound]), strict=True):
        tokens[index] = token
    return tokens


def _choose(logits_RV: Tensor, rows: Sequence[Row]) -> list[int]:
    logits_RV = logits_RV.to("cpu", torch.float32, copy=True)
    for logits_V, row in zip(logits_RV, rows, strict=True):
        if _adjusts(row):
            logits_V.copy_(adjusted(logits_V, row))
    tokens: list[int] = logits_RV.argmax(-1).tolist()
    drawn = [index for index, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        probs_RV = distributions(logits_RV[drawn], [rows[index].params for index in drawn])
        for index, probs_V in zip(drawn, probs_RV, strict=True):
            seed = rows[index].params.seed
            assert seed is not None, "a continuation has a seed"
            tokens[index] = draw_at(probs_V, seed, rows[index].position)
    return tokens


def _adjusts(row: Row) -> bool:
    return bool(row.banned) or row.allowed_V is not None or row.params.penalises or bool(row.params.logit_bias)


def adjusted(logits_V: Tensor, row: Row) -> Tensor:
    """Logits after penalties, bias, bans and grammar, [V]. The input may be changed."""
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor([*row.prompt, *row.output], dtype=torch.int64).unique()
        # Finite under any penalty: beside an infinity, what a grammar forbids would be as likely as what it allows.
        values = logits_V[seen].double()
        values = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        largest = torch.finfo(logits_V.dtype).max
        logits_V[seen] = values.clamp(-largest, largest).to(logits_V.dtype)
    if row.output and (params.presence_penalty or params.frequency_penalty):
        said, counts = torch.tensor(row.output, dtype=torch.int64).unique(return_counts=True)
        logits_V[said] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        biased = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        logits_V[biased] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
    if row.allowed_V is not None:
        logits_V = logits_V.masked_fill(~row.allowed_V, float("-inf"))
    if row.banned:
        unended_V = logits_V.index_fill(0, torch.tensor(list(row.banned), dtype=torch.int64), float("-inf"))
        if unended_V.isfinite().any():  # where a grammar leaves nothing but the end, it ends
            logits_V = unended_V
    return logits_V


def describe(logits_V: Tensor, token: int, num_top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log probability of `token` and the likeliest tokens with theirs, by the model's own distribution [V]."""
    logprobs_V = logits_V.float().log_softmax(-1)
    top = logprobs_V.topk(num_top)
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return float(logprobs_V[token]), pairs


def with_logprobs(token: Token, logits_V: Tensor, params: SamplingParams) -> Token:
    """The token with the log probabilities that its request asked for."""
    if params.logprobs is None:
        return token
    logprob, top = describe(logits_V, token.id, min(params.logprobs, len(logits_V)))
    return Token(token.id, logprob, top, token.proposed, token.experts)
