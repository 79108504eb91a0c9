"""The engine's plain twin: one prompt, or a batch of equally long ones, prefilled, then decoded token by token.

To check the engine by and to be read; `serve.engine` is what to use. Speculative decoding drafts with the MTP modules
and lets the main model check all drafts in one pass; greedy output is token for token that of plain decoding, sampled
output has exactly its distribution.

Shapes: B batch, S prompt tokens, V vocabulary, D here is the MTP depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.model.cache import LatentCache
from dsv3.model.transformer import Transformer
from dsv3.serve.draft_counts import DraftCounts
from dsv3.serve.sampling import SamplingParams, distribution, draw, verify_drafts


@dataclass
class GenerationStats(DraftCounts):
    """Filled in while tokens come."""

    new_tokens: int = 0
    decode_steps: int = 0  # passes of the main model after the prompt's


def generate(
    model: Transformer,
    tokens: Tensor | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    speculative: bool = False,
    eos_token_id: int | None = None,
    stats: GenerationStats | None = None,
) -> Tensor:
    """Continue `tokens` ([S] or [B, S] int64, or a list of ids) by up to `max_new_tokens`.

    Returns prompt and continuation, int64 [S + n] or [B, S + n]. A row ends with `eos_token_id` (never, if None);
    rows that end early are filled up with it. `speculative` needs a model with MTP modules and runs the rows one
    after another. Raises `UserError` for an empty prompt, ids outside the vocabulary, too many tokens.
    """
    prompt_BS = _as_tensor(tokens)
    single = prompt_BS.dim() == 1
    prompt_BS = prompt_BS.unsqueeze(0) if single else prompt_BS
    params = SamplingParams(temperature, top_p, seed)
    stats = stats if stats is not None else GenerationStats()
    generator = params.generator()
    rows: list[list[int]]
    if speculative:
        rows = [
            _speculative(model, row, max_new_tokens, params, generator, stats, eos_token_id)
            for row in prompt_BS.split(1)
        ]
    else:
        rows = _plain(model, prompt_BS, max_new_tokens, params, generator, stats, eos_token_id)
    length = max(map(len, rows))
    fill = eos_token_id if eos_token_id is not None else 0  # without an end token no row is shorter
    new_BN = torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.int64)
    out = torch.cat((prompt_BS.cpu(), new_BN.view(len(rows), length)), dim=1).to(prompt_BS.device)
    return out[0] if single else out


@torch.inference_mode()
def _plain(
    model: Transformer,
    prompt_BS: Tensor,
    max_new_tokens: int,
    params: SamplingParams,
    generator: torch.Generator,
    stats: GenerationStats,
    eos: int | None,
) -> list[list[int]]:
    """The new tokens of each row, equally many: until every row has ended."""
    B, S = prompt_BS.shape
    _check(model.config, prompt_BS, max_new_tokens)
    device = model.device
    cache = _cache(model, B, S + max_new_tokens)
    inputs_BS = prompt_BS.to(device)
    ended_B = torch.zeros(B, dtype=torch.bool)
    new_BN = torch.empty(B, 0, dtype=torch.int64)
    while new_BN.shape[1] < max_new_tokens and not ended_B.all():
        hidden_BSD = model.extend(inputs_BS, cache)
        tokens_B = draw(distribution(model.lm_head(hidden_BSD[:, -1]), params), generator)
        if eos is not None:
            tokens_B[ended_B] = eos
            ended_B |= tokens_B == eos
        inputs_BS = tokens_B.unsqueeze(1).to(device)
        new_BN = torch.cat((new_BN, tokens_B.unsqueeze(1)), dim=1)
    stats.new_tokens += new_BN.numel()
    stats.decode_steps += max(new_BN.shape[1] - 1, 0)
    rows: list[list[int]] = new_BN.tolist()
    return rows


@torch.inference_mode()
def _speculative(
    model: Transformer,
    prompt_1S: Tensor,
    max_new_tokens: int,
    params: SamplingParams,
    generator: torch.Generator,
    stats: GenerationStats,
    eos: int | None,
) -> list[int]:
    """The new tokens of one prompt, up to the end token."""
    _check(model.config, prompt_1S, max_new_tokens)
    if not len(model.mtp):
        raise UserError("speculative decoding drafts with MTP modules and this model has none: decode without it")
    device = model.device
    known: list[int] = prompt_1S[0].tolist()
    end = len(known) + max_new_tokens
    cache = _cache(model, 1, end)
    drafter = Drafter(model, cache, params, generator)

    if max_new_tokens == 0:
        return []
    hidden_1SD = model.extend(prompt_1S.to(device), cache)
    known.append(int(draw(distribution(model.lm_head(hidden_1SD[:, -1]), params), generator)))
    while len(known) < end and known[-1] != eos:
        # One token comes anyway; more drafts than there is room for would be thrown away.
        drafts, draft_probs_KV = drafter.draft(known, hidden_1SD, limit=end - len(known) - 1)
        checked = torch.tensor([[known[-1], *drafts]], device=device)
        hidden_1SD = model.extend(checked, cache)
        target_probs_KV = distribution(model.lm_head(hidden_1SD[0]), params)
        stood, follower = verify_drafts(drafts, draft_probs_KV, target_probs_KV, generator)
        new = [*drafts[:stood], follower]
        if eos in new:
            new = new[: new.index(eos) + 1]
        known += new
        hidden_1SD = hidden_1SD[:, : stood + 1]
        for layer in range(model.config.num_hidden_layers):
            cache.truncate(layer, cache.length(layer) - (len(drafts) - stood))
        stats.count_drafts(len(drafts), stood)
        stats.decode_steps += 1
    new = known[prompt_1S.shape[1] :]
    stats.new_tokens += len(new)
    return new


class Drafter:
    """Chains the MTP modules: module k, reading draft k-1, drafts the token k places after the last known one.

    Of N known tokens (0..N-1) the main model has hidden states at 0..N-2. Module k at position i reads token i+k,
    so its first N-k positions rest on known tokens only: those stay in the cache, the k-1 behind them rest on
    drafts and are taken back after use. Module k+1 runs one position behind module k; `_carry` holds the one
    hidden state that it still needs from the round before.
    """

    def __init__(
        self, model: Transformer, cache: LatentCache, params: SamplingParams, generator: torch.Generator
    ) -> None:
        self._model, self._cache, self._params, self._generator = model, cache, params, generator
        self._carry: list[Tensor | None] = [None] * len(model.mtp)

    def draft(self, known: list[int], hidden_1SD: Tensor, limit: int) -> tuple[list[int], Tensor]:
        """Up to `limit` drafts, and the distributions [K, V] they were drawn from.

        hidden: the main model's, at every position up to N-2 that was not given before.
        """
        model, config, cache = self._model, self._model.config, self._cache
        N, device = len(known), hidden_1SD.device
        drafts: list[int] = []
        probs = [torch.zeros(0, config.vocab_size)]
        for k in range(1, min(len(model.mtp), limit) + 1):
            layer = config.num_hidden_layers + k - 1
            start = cache.length(layer)  # positions start .. N-2 are run now
            tokens = [*known, *drafts][start + k :]
            out_1SD = model.extend_mtp(k, hidden_1SD, torch.tensor([tokens], device=device), cache)
            q_1V = distribution(model.lm_head(out_1SD[:, -1]), self._params)
            drafts.append(int(draw(q_1V, self._generator)))
            probs.append(q_1V)
            settled = max(N - k, 0)
            cache.truncate(layer, settled)
            carried = self._carry[k - 1]
            # The next module starts where its cache ends: with the hidden state carried over, then the new ones.
            hidden_1SD = out_1SD if carried is None else torch.cat((carried, out_1SD), dim=1)
            self._carry[k - 1] = out_1SD[:, settled - 1 - start : settled - start] if settled else None
        return drafts, torch.cat(probs)


def _as_tensor(tokens: Tensor | Sequence[int]) -> Tensor:
    expected = "expected token ids, [S] or [B, S] whole numbers"
    try:
        prompt = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the prompt is no array ({error}), {expected}") from None
    if prompt.dim() not in (1, 2) or (prompt.dim() == 2 and len(prompt) == 0):
        raise UserError(f"the prompt has shape {list(prompt.shape)}, {expected}")
    if prompt.numel() and (prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool):
        raise UserError(f"the prompt has dtype {prompt.dtype}, {expected}")
    return prompt.to(torch.int64)


def _check(config: ModelConfig, prompt_BS: Tensor, max_new_tokens: int) -> None:
    S = prompt_BS.shape[1]
    if S == 0:
        raise UserError("the prompt is empty, expected at least one token")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected at least 0")
    if S + max_new_tokens > config.max_position_embeddings:
        raise UserError(
            f"{S} prompt tokens and {max_new_tokens} new ones are more than max_position_embeddings "
            f"({config.max_position_embeddings}): shorten the prompt or ask for fewer"
        )
    low, high = int(prompt_BS.min()), int(prompt_BS.max())
    if low < 0 or high >= config.vocab_size:
        raise UserError(f"prompt has token ids from {low} to {high}, expected [0, {config.vocab_size})")


def _cache(model: Transformer, batch_size: int, length: int) -> LatentCache:
    return LatentCache(model.config, batch_size, length, dtype=model.dtype, device=model.device)
