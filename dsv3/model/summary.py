"""What a model of some shape consists of, counted on the model itself, built without memory on the meta device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from dsv3.config import ModelConfig
from dsv3.model.transformer import Transformer


def summarise(config: ModelConfig) -> dict[str, Any]:
    """Counts of parameters, experts and cache, as plain numbers.

    `parameters.total` includes selection biases and leaves MTP out, as the figure of 671B does. A token activates
    everything but the routed experts it was not sent to.
    """
    with torch.device("meta"):
        model = Transformer(config)
    by_part: Counter[str] = Counter()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        by_part[_part(name)] += tensor.numel()
    mtp = by_part.pop("mtp", 0)
    total = sum(by_part.values())

    moe_layers = sum(map(config.is_moe_layer, range(config.num_hidden_layers)))
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = moe_layers * (config.n_routed_experts - config.num_experts_per_tok) * expert
    embedding, head = by_part["embedding"], by_part["head"]
    core = total - embedding - head - idle
    attention = sum(p.numel() for p in model.layers[0].get_submodule("self_attn").parameters())
    per_layer, active = config.n_routed_experts + config.n_shared_experts, config.num_experts_per_tok
    return {
        "parameters": {
            "total": total,
            "mtp": mtp,
            "activated_without_embedding_and_head": core,
            "activated_with_head": core + head,
            "activated": core + head + embedding,
            "mla_per_layer": attention,
            "expert": expert,
            "by_part": dict(by_part),
        },
        "experts": {
            "moe_layers": moe_layers,
            "per_layer": per_layer,
            "total": moe_layers * per_layer,
            "active_per_layer": active + config.n_shared_experts,
            "active_total": moe_layers * (active + config.n_shared_experts),
        },
        "kv_cache": {
            "values_per_token_and_layer": config.latent_dim,
            "values_per_token_and_layer_of_mha": config.num_attention_heads
            * (config.qk_nope_head_dim + config.v_head_dim),
            "bytes_per_token_bf16": 2 * config.latent_dim * config.num_hidden_layers,
        },
    }


_PARTS = (
    ("mtp.", "mtp"),
    ("embed_tokens.", "embedding"),
    ("lm_head.", "head"),
    (".self_attn.", "attention"),
    (".mlp.router.", "routers"),
    (".mlp.experts.", "routed experts"),
    (".mlp.shared_experts.", "shared experts"),
    (".mlp.", "dense FFN"),
    ("norm.", "norms"),
)


def _part(name: str) -> str:
    return next(part for mark, part in _PARTS if mark in name)
