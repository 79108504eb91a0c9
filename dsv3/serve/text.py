"""Text in, text out, as it comes."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3.data.tokenizer import StreamDecoder, Tokenizer
from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.serve.generate import GenerationStats, stream
from dsv3.serve.sampling import SamplingParams


def continue_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    params: SamplingParams,
    speculative: bool,
    stats: GenerationStats,
) -> Iterator[str]:
    """What the model writes behind `prompt`, taken as the beginning of a document, in pieces of whole characters."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model only {model.config.vocab_size}: "
            "they do not belong together"
        )
    decoder = StreamDecoder(tokenizer)
    tokens = [tokenizer.document_start_id, *tokenizer.encode(prompt)]
    for new in stream(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        params=params,
        speculative=speculative,
        eos_token_id=tokenizer.eos_id,
        stats=stats,
    ):
        yield decoder.feed(new)
    yield decoder.flush()
