"""What a model writes while it learns: a continuation of the same held-out text at every evaluation.

Sampled, since a small model's likeliest text goes in circles, but with a generator of its own that starts from the
same seed each time: only the model changes from one sample to the next, and a run with samples trains exactly as one
without. The text is cut to the length that the model is trained on; beyond it a sample would show something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsv3.data.prepared import PreparedData
from dsv3.model.cache import LatentCache
from dsv3.model.transformer import Transformer
from dsv3.train.config import TrainConfig

_PROMPT_TOKENS = 32
_TEMPERATURE = 0.8
_LINE_CHARACTERS = 160


@dataclass(frozen=True)
class Sample:
    """A beginning of held-out text, and what the main model writes behind it."""

    prompt: str
    text: str

    def one_line(self) -> str:
        """The end of the prompt and the text, for a line of a log."""
        prompt, text = (part.replace("\r", "").replace("\n", "\u23ce") for part in (self.prompt, self.text))
        return f"...{prompt[-_LINE_CHARACTERS // 4 :]} \u25b8 {text[:_LINE_CHARACTERS]}"


def draw_sample(model: Transformer, data: PreparedData, config: TrainConfig) -> Sample:
    """Continue the beginning of the first source's held-out text by at most `config.sample_tokens` tokens."""
    tokenizer, length = data.tokenizer, config.seq_len
    beginning = data.sources[0].held_out[0].ids[: min(_PROMPT_TOKENS, max(1, length // 2))].tolist()
    # As every text that is continued; a BOS the data has already.
    start = [tokenizer.document_start_id]
    prompt = beginning if beginning[:1] == start else (start + beginning)[:length]
    # Sharded weights are FP32 whatever is computed in; a run's settings say what that is.
    dtype = model.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    new = continuation(model, prompt, min(config.sample_tokens, length - len(prompt)), tokenizer.eos_id, dtype)
    return Sample(tokenizer.decode(beginning), tokenizer.decode(new))


@torch.no_grad()
def continuation(
    model: Transformer, prompt: Sequence[int], max_new_tokens: int, eos_token_id: int, dtype: torch.dtype
) -> list[int]:
    """Tokens drawn at temperature 0.8, the same draws each time, until `eos_token_id` (left out) or so many.

    dtype: of the model's hidden states.
    """
    device = model.device
    cache = LatentCache(model.config, 1, len(prompt) + max_new_tokens, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(0)
    new: list[int] = []
    inputs = list(prompt)
    while len(new) < max_new_tokens:
        hidden_1SD = model.extend(torch.tensor([inputs], device=device), cache)
        logits_1V = model.lm_head(hidden_1SD[:, -1]).float().cpu()
        if not logits_1V.isfinite().all():
            break  # what to do about broken weights is the guard's to say
        inputs = torch.multinomial((logits_1V / _TEMPERATURE).softmax(-1), 1, generator=generator)[0].tolist()
        if inputs[0] == eos_token_id:
            break
        new += inputs
    return new
