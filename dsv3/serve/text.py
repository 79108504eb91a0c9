"""An engine for a single text: as large as that text and no larger."""

from __future__ import annotations

import dataclasses

from dsv3.data.tokenizer import Tokenizer
from dsv3.model.transformer import Transformer
from dsv3.serve.engine import Engine
from dsv3.serve.engine_config import EngineConfig
from dsv3.serve.params import SamplingParams
from dsv3.serve.prepare import RequestChecker


def engine_for(
    model: Transformer, tokenizer: Tokenizer, prompt: str, params: SamplingParams, config: EngineConfig
) -> Engine:
    """An engine whose cache holds `prompt` and what `params` lets follow. Raises `UserError` if the model cannot."""
    checker = RequestChecker(model.config, tokenizer, model.config.max_position_embeddings)
    request = checker.prepare(prompt, params, request_id=None, cache_salt="")
    return Engine(model, tokenizer, dataclasses.replace(config, cache_tokens=request.max_length))
