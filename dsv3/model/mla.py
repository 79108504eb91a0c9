"""Multi-head latent attention (eq. 1-11): keys and values of all heads come from one small latent per token.

Shapes: B batch, S tokens of this pass, T tokens attended to, D model, H heads, C latent (d_c), N key without
RoPE (d_h), R RoPE (d_h^R), V value, X = C + R what the cache holds.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.model.cache import Piece
from dsv3.model.context import Context
from dsv3.model.norm import RMSNorm
from dsv3.model.rope import rotate, softmax_scale
from dsv3.ops.attention import absorbed_attention, expanded_attention, expanded_partial
from dsv3.ops.latents import Latents
from dsv3.ops.partial_attention import Partial, merge, values_at_a_time
from dsv3.ops.recompute import recomputed


class LatentUpProjection(nn.Linear):
    """W_UK and W_UV: keys and values of all heads from a latent, or the maps themselves for the absorbed order."""

    def __init__(self, config: ModelConfig) -> None:
        self._heads = config.num_attention_heads
        width = config.qk_nope_head_dim + config.v_head_dim
        super().__init__(config.kv_lora_rank, self._heads * width, bias=False)

    def by_head(self) -> Tensor:
        """[H, N + V, C]: of each head W_UK, then W_UV; a view of the weight."""
        return self.weight.unflatten(0, (self._heads, -1))


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
        self.kv_b_proj = LatentUpProjection(config)
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
        if context.cache is None:
            out_BSHV = self._attend(q_nope_BSHN, q_rope_BSHR, c, k_rope, context.mask, absorbed)
        else:
            pieces = context.cache.append(self.layer, torch.cat((c, k_rope), dim=-1))
            out_BSHV = self.attend_to_pieces(q_nope_BSHN, q_rope_BSHR, pieces, absorbed)
        # The kernel keeps its output; where that was padded, the copy without padding need not be kept too.
        return self.o_proj(recomputed(torch.flatten, out_BSHV, 2))

    def _attend(
        self,
        q_nope_BSHN: Tensor,
        q_rope_BSHR: Tensor,
        c: Tensor,
        k_rope: Tensor,
        mask: Tensor | None,
        absorbed: bool | None,
    ) -> Tensor:
        """Attention of whole sequences."""
        if absorbed or (absorbed is None and absorbing_pays(self.config, c.shape[1], c.shape[1])):
            return self._absorbed(q_nope_BSHN, q_rope_BSHR, Latents(torch.cat((c, k_rope), dim=-1)), mask)
        return self._expanded(q_nope_BSHN, q_rope_BSHR, c, k_rope, mask)

    def attend_to_pieces(
        self, q_nope_BSHN: Tensor, q_rope_BSHR: Tensor, pieces: list[Piece], absorbed: bool | None = None
    ) -> Tensor:
        """Attention of a pass over cached latents; its pieces may be of sequences of different lengths."""
        q_nope_THN, q_rope_THR = q_nope_BSHN.flatten(0, 1), q_rope_BSHR.flatten(0, 1)
        outs_tHV, start = [], 0
        for piece in pieces:
            (B, T), S = piece.latents.shape, piece.num_queries
            nope, rope = (q[start : start + B * S].unflatten(0, (B, S)) for q in (q_nope_THN, q_rope_THR))
            if absorbed or (absorbed is None and absorbing_pays(self.config, S, T)):
                out_BSHV = self._absorbed(nope, rope, piece.latents, piece.mask)
            else:
                out_BSHV = self._expanded_in_parts(nope, rope, piece.latents.side_by_side(), piece.mask)
            outs_tHV.append(out_BSHV.flatten(0, 1))
            start += B * S
        out_THV = torch.cat(outs_tHV) if len(outs_tHV) > 1 else outs_tHV[0]
        return out_THV.unflatten(0, q_nope_BSHN.shape[:2])

    def _absorbed(self, q_nope_BSHN: Tensor, q_rope_BSHR: Tensor, latents: Latents, mask: Tensor | None) -> Tensor:
        """[B, S, H, V]: S queries over T latents, of which no key or value is made; few queries of a long context."""
        (B, S, H, _), T = q_nope_BSHN.shape, latents.shape[1]
        size = max(1, values_at_a_time(q_nope_BSHN.device) // (B * H * T))
        if mask is None and size < S:
            rows = [slice(start, min(start + size, S)) for start in range(0, S, size)]
            outs = [
                self._absorbed(q_nope_BSHN[:, r], q_rope_BSHR[:, r], latents.first(T - S + r.stop), None) for r in rows
            ]
            return torch.cat(outs, dim=1)
        return absorbed_attention(q_nope_BSHN, q_rope_BSHR, latents, self.kv_b_proj.by_head(), self.scale, mask)

    def _expanded(
        self, q_nope_BSHN: Tensor, q_rope_BSHR: Tensor, c: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        """[B, S, H, V]: S queries over T keys and values, made of c [B, T, C] and k_rope [B, T, R]."""
        k_nope_BTHN, v_BTHV = self._keys_and_values(c)
        return expanded_attention(q_nope_BSHN, q_rope_BSHR, k_nope_BTHN, k_rope, v_BTHV, self.scale, mask)

    def _expanded_in_parts(
        self, q_nope_BSHN: Tensor, q_rope_BSHR: Tensor, latents_BTX: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The same over cached latents, however many: part after part of a long context, merged.

        Parts begin at multiples of their size, wherever the pass begins; the pass's own tokens, of which there are as
        many queries in memory anyway, are a part for themselves.
        """
        (B, S, H, _), T = q_nope_BSHN.shape, latents_BTX.shape[1]
        per_token = B * H * (self.config.qk_head_dim + self.config.v_head_dim)
        size = max(1, values_at_a_time(latents_BTX.device) // per_token)
        before = T - S if mask is None else T
        if before <= size:
            return self._expanded(q_nope_BSHN, q_rope_BSHR, *self._split_latents(latents_BTX), mask)
        seen: Partial | None = None
        for start, end in pairwise([*range(0, before, size), before, *([T] if before < T else [])]):
            c, k_rope = self._split_latents(latents_BTX[:, start:end])
            k_nope_BTHN, v_BTHV = self._keys_and_values(c)
            inputs = (q_nope_BSHN, q_rope_BSHR, k_nope_BTHN, k_rope, v_BTHV)
            mask_of_part = None if mask is None else mask[..., start:end]
            part = expanded_partial(*inputs, self.scale, mask_of_part, causal=end > before)
            seen = part if seen is None else merge(seen, part)
        assert seen is not None
        return seen.out_BHSV.to(latents_BTX.dtype).transpose(1, 2)

    def _split_latents(self, latents_BTX: Tensor) -> tuple[Tensor, Tensor]:
        c, k_rope = latents_BTX.split((self.config.kv_lora_rank, self.config.qk_rope_head_dim), dim=-1)
        return c, k_rope

    def _keys_and_values(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Keys without their rotated part [B, T, H, N] and values [B, T, H, V] of all heads."""
        kv_BTHM = recomputed(self.kv_b_proj, c).unflatten(-1, (self.config.num_attention_heads, -1))
        k_nope_BTHN, v_BTHV = kv_BTHM.split((self.config.qk_nope_head_dim, self.config.v_head_dim), dim=-1)
        return k_nope_BTHN, v_BTHV


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
