"""Models to test with: smaller than `micro`, one for every switch of the architecture, every part of weight."""

from __future__ import annotations

import torch

from dsv3.config import ModelConfig, RopeScaling
from dsv3.model.norm import RMSNorm
from dsv3.model.router import Router
from dsv3.model.transformer import Transformer

BASE = ModelConfig.preset("micro").replace(
    vocab_size=48,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=2,
    q_lora_rank=24,
    max_position_embeddings=64,
)

# Betas that fit so few pairs; mscale differs from mscale_all_dim, so that cos and sin are scaled too.
YARN = RopeScaling(
    factor=8, original_max_position_embeddings=16, beta_fast=2, beta_slow=0.1, mscale=0.8, mscale_all_dim=1.3
)

VARIANTS: dict[str, ModelConfig] = {
    "v3": BASE,
    "no query latent, 2 shared experts, D=2": BASE.replace(
        q_lora_rank=None, n_shared_experts=2, num_nextn_predict_layers=2
    ),
    "yarn, no shared experts, D=3": BASE.replace(
        rope_scaling=YARN, n_shared_experts=0, num_nextn_predict_layers=3, qk_rope_head_dim=12
    ),
    "every second layer MoE, D=2": BASE.replace(
        num_hidden_layers=3, first_k_dense_replace=0, moe_layer_freq=2, num_nextn_predict_layers=2
    ),
    "V2's router, no MTP": BASE.replace(
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        n_group=2,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=4.0,
        num_nextn_predict_layers=0,
    ),
    "greedy, small latent, wide values": BASE.replace(topk_method="greedy", kv_lora_rank=8, v_head_dim=28),
    "one group, three experts a token, all MoE": BASE.replace(
        n_group=1, topk_group=1, num_experts_per_tok=3, first_k_dense_replace=0
    ),
}


def random_model(config: ModelConfig, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model in which no weight is idle: norms differ from 1, biases from 0, scores and logits spread."""
    model = Transformer(config)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if isinstance(module, RMSNorm):
                    parameter.uniform_(0.5, 1.5, generator=generator)
                elif module is model.embed_tokens:
                    parameter.normal_(generator=generator)
                else:
                    gain = 2.0 if isinstance(module, Router) or module is model.lm_head else 1.0
                    parameter.normal_(std=gain * parameter.shape[-1] ** -0.5, generator=generator)
            if isinstance(module, Router) and module.e_score_correction_bias is not None:
                module.e_score_correction_bias.uniform_(-0.3, 0.3, generator=generator)
    return model.to(dtype)


def random_tokens(config: ModelConfig, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape, generator=generator)
