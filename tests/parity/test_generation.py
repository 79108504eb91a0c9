"""Decoding over a cache against transformers over its own: logits chunk by chunk, then whole greedy continuations.

Shapes: B batch, S tokens of one pass.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from dsv3.model.cache import LatentCache
from dsv3.serve.generate import generate
from tests.parity.configs import CASES
from tests.parity.twin import assert_close, clear_tokens, make_twin, random_tokens

cases = pytest.mark.parametrize("case", ["v3", "yarn, no q_lora", "moonlight", "v2 group_limited_greedy"])


@cases
def test_cached_logits(case: str, generator: torch.Generator, tmp_path: Path) -> None:
    config = CASES[case]
    twin = make_twin(config, tmp_path, generator)
    chunks = [53, 1, 1, 7, 1, 2, 1, 14]  # a prompt, tokens one by one, and a few at a time as drafts come
    tokens_BS = clear_tokens(twin.ours, 2, sum(chunks), generator)
    our_cache = LatentCache(config, 2, sum(chunks), dtype=torch.float32)
    their_cache = DynamicCache(config=twin.theirs.config)
    with torch.no_grad():
        whole = twin.theirs(tokens_BS).logits
        start = 0
        for size in chunks:
            chunk_BS = tokens_BS[:, start : start + size]
            ours = twin.ours.lm_head(twin.ours.extend(chunk_BS, our_cache))
            theirs = twin.theirs(chunk_BS, past_key_values=their_cache).logits
            assert_close(f"logits from {start} on", ours, theirs)
            assert_close(f"logits from {start} on, against one pass", ours, whole[:, start : start + size])
            start += size


@cases
def test_greedy_batch_with_an_end_token(case: str, generator: torch.Generator, tmp_path: Path) -> None:
    config = CASES[case]
    twin = make_twin(config, tmp_path, generator)
    prompt_BS = random_tokens(config, 3, 11, generator)
    settings = {"attention_mask": torch.ones_like(prompt_BS), "do_sample": False, "max_new_tokens": 40}

    ours = generate(twin.ours, prompt_BS, max_new_tokens=40)
    theirs = twin.theirs.generate(prompt_BS, **settings, eos_token_id=None)
    assert ours.tolist() == theirs.tolist()

    # One row ends early and is filled up while the others go on.
    end = int(ours[0, prompt_BS.shape[1] + 3])
    ours = generate(twin.ours, prompt_BS, max_new_tokens=40, eos_token_id=end)
    theirs = twin.theirs.generate(prompt_BS, **settings, eos_token_id=end, pad_token_id=end)
    assert ours.tolist() == theirs.tolist()
