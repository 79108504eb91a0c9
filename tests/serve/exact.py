"""The exact distribution that samples must have, worked out on a model small enough to go through every text."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dsv3.model.transformer import Transformer
from dsv3.serve.sampling import SamplingParams, distribution
from tests.chi_square import chi_square_p
from tests.variants import BASE, random_model

VOCABULARY = 8


def small_model(depth: int, generator: torch.Generator) -> Transformer:
    """`depth` MTP modules whose drafts stand about as often as they fall."""
    config = BASE.replace(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        first_k_dense_replace=9,  # dense: quick, and routing has nothing to do with it
        num_nextn_predict_layers=depth,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = random_model(config, generator)
    with torch.no_grad():
        model.lm_head.weight *= 0.5
    return model


def check_three_tokens(model: Transformer, prompt_1S: Tensor, params: SamplingParams, samples: list[list[int]]) -> None:
    """Chi-square of the first three tokens of each sample against their joint distribution and its margins."""
    V = VOCABULARY
    pairs = torch.tensor(list(itertools.product(range(V), repeat=2)))
    with torch.no_grad():
        probs = distribution(model(torch.cat((prompt_1S.expand(V * V, -1), pairs), dim=1)).logits[:, -3:], params)
    first, second, third = probs[0, 0], probs[:, 1].view(V, V, V)[:, 0], probs[:, 2].view(V, V, V)
    joint = first[:, None, None] * second[:, :, None] * third
    observed = torch.zeros(V, V, V, dtype=torch.int64)
    for a, b, c in (sample[:3] for sample in samples):
        observed[a, b, c] += 1
    assert chi_square_p(observed.sum((1, 2)).tolist(), joint.sum((1, 2)).tolist()) > 1e-4
    assert chi_square_p(observed.sum(2).flatten().tolist(), joint.sum(2).flatten().tolist()) > 1e-4
    assert chi_square_p(observed.flatten().tolist(), joint.flatten().tolist()) > 1e-4
