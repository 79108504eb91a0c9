"""Whether a converted checkpoint still computes the same function: divergence on random tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.pretrained import load_pretrained
from dsv3.errors import UserError


@torch.no_grad()
def verify(
    source: str | Path, target: str | Path, *, num_tokens: int = 256, seed: int = 0, device: str | torch.device = "cpu"
) -> dict[str, dict[str, float]]:
    """KL(source || target) of the next-token distributions on one sequence of random tokens, both models in FP32.

    Returns for "main" and each MTP module ("mtp.0", ...) the mean and the largest KL over positions, in nats, and
    `top1_agreement`, the share of positions where both have the same most likely token. The models are loaded one
    after the other. Raises `UserError` if the two do not predict the same things (vocabulary, MTP modules).
    """
    first = _log_probs(source, num_tokens, seed, device)
    second = _log_probs(target, num_tokens, seed, device)
    if {name: p.shape for name, p in first.items()} != {name: p.shape for name, p in second.items()}:
        raise UserError(f"{source} and {target} differ in vocabulary or MTP modules and cannot be compared")
    return {name: _divergence(first[name], second[name]) for name in first}


def _log_probs(path: str | Path, num_tokens: int, seed: int, device: str | torch.device) -> dict[str, Tensor]:
    """Log-probabilities [S, V] FP32 on the CPU, for the main model and each MTP module."""
    model = load_pretrained(path, dtype=torch.float32, device=device)
    length = min(num_tokens, model.config.max_position_embeddings)
    if length <= model.config.num_nextn_predict_layers:
        raise UserError(f"num_tokens is {num_tokens}, too few to predict from: give at least {len(model.mtp) + 1}")
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(device)
    output = model(tokens_BS)
    logits = {"main": output.logits} | {f"mtp.{k}": logits for k, logits in enumerate(output.mtp_logits)}
    return {name: value[0].log_softmax(-1).cpu() for name, value in logits.items()}


def _divergence(p_SV: Tensor, q_SV: Tensor) -> dict[str, float]:
    """p, q: log-probabilities."""
    kl_S = (p_SV.exp() * (p_SV - q_SV)).sum(-1)
    agree_S = p_SV.argmax(-1) == q_SV.argmax(-1)
    return {
        "kl_mean": kl_S.mean().item(),
        "kl_max": kl_S.max().item(),
        "top1_agreement": agree_S.float().mean().item(),
    }
