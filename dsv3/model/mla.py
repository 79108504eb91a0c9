"""Multi-head latent attention (eq. 1-11): keys and values of all heads come from one small latent per token.

Shapes: B batch, S tokens of this pass, T tokens attended to, D model, H heads, C latent (d_c), N key without
RoPE (d_h), R RoPE (d_h^R), V value, X = C + R what the cache holds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.model.context import Context
from dsv3.model.norm import RMSNorm
from dsv3.model.rope import rotate, softmax_scale
from dsv3.ops.attention import absorbed_attention, attention
from dsv3.ops.recompute import recomputed


class MultiHeadLatentAttention(nn.Module):
    """One function, two orders of its products: *expanded* makes keys and values, *absorbed* works on latents."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D, H, C, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        self.config, self.layer = config, layer
        self.scale = softmax_scale(config)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, H * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, H * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, C + R, bias=False)
        self.kv_a_layernorm = RMSNorm(C, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(C, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(H * config.v_head_dim, D, bias=False)

    def forward(self, x_BSD: Tensor, context: Context, absorbed: bool | None = None) -> Tensor:
        """u_t of eq. 11, [B, S, D]. `absorbed` forces one order of products; None takes the cheaper one."""
        config = self.config
        H, N, R = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        cos, sin = context.cos, context.sin

        if config.q_lora_rank is None:
            q = recomputed(self.q_proj, x_BSD)
        else:
            q = recomputed(self.q_b_proj, self.q_a_layernorm(self.q_a_proj(x_BSD)))
        q_nope_BSHN, q_rope_BSHR = q.unflatten(-1, (H, N + R)).split((N, R), dim=-1)
        q_rope_BSHR = recomputed(rotate, q_rope_BSHR, cos.unsqueeze(2), sin.unsqueeze(2))

        c_BSC, k_rope_BSR = self.kv_a_proj_with_mqa(x_BSD).split((config.kv_lora_rank, R), dim=-1)
        c, k_rope = self.kv_a_layernorm(c_BSC), recomputed(rotate, k_rope_BSR, cos, sin)
        if context.cache is not None:
            latents_BTX = context.cache.append(self.layer, torch.cat((c, k_rope), dim=-1))
            c, k_rope = latents_BTX.split((config.kv_lora_rank, R), dim=-1)

        if absorbed is None:
            absorbed = absorbing_pays(config, x_BSD.shape[1], c.shape[1])
        if absorbed:
            w_uk_HNC, w_uv_HVC = self.kv_b_proj.weight.unflatten(0, (H, -1)).split((N, config.v_head_dim), dim=1)
            out_BSHV = absorbed_attention(
                q_nope_BSHN, q_rope_BSHR, c, k_rope, w_uk_HNC, w_uv_HVC, self.scale, context.mask
            )
        else:
            kv_BTHNV = recomputed(self.kv_b_proj, c).unflatten(-1, (H, -1))
            k_nope_BTHN, v_BTHV = kv_BTHNV.split((N, config.v_head_dim), dim=-1)
            k_rope_BTHR = k_rope.unsqueeze(2).expand(-1, -1, H, -1)
            k_BTHK = recomputed(_join, k_nope_BTHN, k_rope_BTHR)
            q_BSHK = recomputed(_join, q_nope_BSHN, q_rope_BSHR)
            out_BSHV = attention(
                q_BSHK.transpose(1, 2), k_BTHK.transpose(1, 2), v_BTHV.transpose(1, 2), self.scale, context.mask
            ).transpose(1, 2)
        # The kernel keeps its output; where that was padded, the copy without padding need not be kept too.
        return self.o_proj(recomputed(torch.flatten, out_BSHV, 2))


def _join(nope: Tensor, rope: Tensor) -> Tensor:
    return torch.cat((nope, rope), dim=-1)


def absorbing_pays(config: ModelConfig, num_queries: int, num_keys: int) -> bool:
    """Whether the absorbed order costs fewer multiplications than the expanded one (per head, projections included).

    Expanded makes a key and a value of all T tokens before S queries look at them; absorbed turns S queries and
    S outputs instead, but its products with T latents are wider. A prompt (S = T) runs expanded, a decoded token
    absorbed.
    """
    S, T, C = num_queries, num_keys, config.kv_lora_rank
    projected = C * (config.qk_nope_head_dim + config.v_head_dim)
    expanded = T * projected + S * T * (config.qk_head_dim + config.v_head_dim)
    absorbed = S * projected + S * T * (config.latent_dim + C)
    return absorbed < expanded
