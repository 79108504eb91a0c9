"""The shapes that are compared: tiny members of the DeepSeek-V3 family, one for each rule that may be got wrong."""

from __future__ import annotations

from dsv3.config import ModelConfig, RopeScaling

# No width is a multiple of 128, nor equal to another one that it could be mistaken for.
TINY = ModelConfig(
    vocab_size=101,
    hidden_size=68,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    intermediate_size=92,
    moe_intermediate_size=28,
    n_shared_experts=1,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    q_lora_rank=36,
    kv_lora_rank=24,
    qk_nope_head_dim=20,
    qk_rope_head_dim=16,
    v_head_dim=12,
    max_position_embeddings=256,
    num_nextn_predict_layers=0,
    bos_token_id=None,
    eos_token_id=None,
)

# Sequences of more than 64 tokens leave the original context; pairs lie below, on and above the ramp.
YARN = RopeScaling(factor=4, original_max_position_embeddings=64, beta_fast=4)

# Their V2 wants a hidden size that its heads divide.
V2 = TINY.replace(
    num_attention_heads=4,
    num_key_value_heads=4,
    scoring_func="softmax",
    topk_method="greedy",
    norm_topk_prob=False,
    n_shared_experts=2,
)

CASES: dict[str, ModelConfig] = {
    "v3": TINY,
    "no q_lora": TINY.replace(q_lora_rank=None),
    "yarn": TINY.replace(rope_scaling=YARN),
    "yarn, no q_lora": TINY.replace(rope_scaling=YARN, q_lora_rank=None),
    "yarn that scales cos and sin": TINY.replace(
        rope_scaling=RopeScaling(factor=4, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.5)
    ),
    "many groups": TINY.replace(n_group=8, topk_group=3, num_experts_per_tok=6),
    "no normalisation": TINY.replace(norm_topk_prob=False, routed_scaling_factor=1.0),
    "all dense": TINY.replace(first_k_dense_replace=4),
    "all MoE": TINY.replace(first_k_dense_replace=0, n_shared_experts=3),
    "values wider than keys": TINY.replace(hidden_size=52, v_head_dim=44, qk_rope_head_dim=4, kv_lora_rank=20),
    "moonlight": TINY.replace(
        n_group=1,
        topk_group=1,
        n_shared_experts=2,
        q_lora_rank=None,
        rope_theta=50000.0,
        num_experts_per_tok=6,
        routed_scaling_factor=2.446,
    ),
    "v2 greedy": V2.replace(
        q_lora_rank=None, n_group=1, topk_group=1, num_experts_per_tok=6, routed_scaling_factor=1.0
    ),
    "v2 group_limited_greedy": V2.replace(
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        routed_scaling_factor=4.0,
        rope_scaling=RopeScaling(
            factor=4, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.707, beta_fast=4
        ),
    ),
}
