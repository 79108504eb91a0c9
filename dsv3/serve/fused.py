"""A block on a few tokens in three native calls around its attention.

To a decoding sequence a block is some sixty operations, each of which takes longer to begin than to run. Here they are
three: what leads to attention, what leads to the experts, and these. The functions are `Block`'s, the weights are its
own (BF16, or int8 with scales), and whatever these calls do not take goes to the block itself.

Shapes: n tokens (one row, as the engine packs them), D model, H heads, X latent, K experts chosen of E.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

from dsv3.model.block import Block
from dsv3.model.context import Context
from dsv3.model.experts import DeepSeekMoE, Experts, SwiGLU
from dsv3.model.router import Routing
from dsv3.ops import native
from dsv3.ops.packed import Stored

_FEW_TOKENS = 8  # up to there our own kernel is faster than oneDNN on packed weights
_NO_MAP = native.Map(None, None)


class FusedBlock(nn.Module):
    """Takes the place of a `Block` whose maps are packed."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        attn, mlp = block.self_attn, block.mlp
        self._config = attn.config
        self._kept: list[Tensor] = []  # what the maps point to
        low = attn.config.q_lora_rank is not None
        self._q_a = self._map(stored(attn.q_a_proj)) if low else _NO_MAP
        self._q_b = self._map(stored(attn.q_b_proj if low else attn.q_proj))
        self._kv_a, self._o = self._map(stored(attn.kv_a_proj_with_mqa)), self._map(stored(attn.o_proj))
        local = mlp.shared_experts if isinstance(mlp, DeepSeekMoE) else mlp
        self._local = self._local_down = self._gate_up = self._down = _NO_MAP
        self._local_width = self._num_experts = 0
        if local is not None:
            self._local, self._local_down = self._map(stored(local.gate_up_proj)), self._map(stored(local.down_proj))
            self._local_width = _down(local).shape[1]
        if isinstance(mlp, DeepSeekMoE):
            gate_up, down = stored_experts(mlp.experts)
            self._gate_up, self._down = self._map(gate_up), self._map(down)
            self._num_experts = self._config.n_routed_experts

    def _map(self, kept: Stored | None) -> native.Map:
        assert kept is not None, "can_fuse() said so"
        weight, scale = kept
        self._kept += [weight] if scale is None else [weight, scale]
        return native.Map(weight.data_ptr(), None if scale is None else scale.data_ptr())

    def forward(self, h_BSD: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
        B, n, _ = h_BSD.shape
        few = B == 1 and n <= _FEW_TOKENS and context.cache is not None and not has_torch_function((h_BSD,))
        if not (few and native.usable(h_BSD) and h_BSD.is_contiguous()):
            out: tuple[Tensor, Routing | None] = self.block(h_BSD, context)
            return out
        assert context.cache is not None
        q_1nHK, latent_1nX = self._before(h_BSD, context)
        attn, config = self.block.self_attn, self._config
        pieces = context.cache.append(attn.layer, latent_1nX)
        nope, rope = q_1nHK.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        return self._behind(attn.attend_to_pieces(nope, rope, pieces), h_BSD)

    def _before(self, h_1nD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        config, attn = self._config, self.block.self_attn
        n, D, H, C = h_1nD.shape[1], config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        N, R, Q = config.qk_nope_head_dim, config.qk_rope_head_dim, config.q_lora_rank or 0
        q_1nHK, latent_1nX = h_1nD.new_empty(1, n, H, N + R), h_1nD.new_empty(1, n, C + R)
        scratch = h_1nD.new_empty(n * (D + Q + C + R))
        native.loaded().block_before(
            *(h_1nD.data_ptr(), self.block.input_layernorm.weight.data_ptr()),
            *(self._q_a, attn.q_a_layernorm.weight.data_ptr() if Q else None, self._q_b),
            *(self._kv_a, attn.kv_a_layernorm.weight.data_ptr(), config.rms_norm_eps),
            *(context.cos.data_ptr(), context.sin.data_ptr()),
            *(q_1nHK.data_ptr(), latent_1nX.data_ptr(), scratch.data_ptr()),
            *(n, D, Q, H, N, C, R, torch.get_num_threads()),
        )
        return q_1nHK, latent_1nX

    def _behind(self, attended_1nHV: Tensor, h_1nD: Tensor) -> tuple[Tensor, Routing | None]:
        config, mlp, lib = self._config, self.block.mlp, native.loaded()
        n, D, E, K = h_1nD.shape[1], config.hidden_size, self._num_experts, config.num_experts_per_tok
        F, L, threads = config.moe_intermediate_size, self._local_width, torch.get_num_threads()
        attended_1nHV = attended_1nHV.contiguous()
        residual, x, out = (torch.empty_like(h_1nD) for _ in range(3))
        router = bias = None
        K = K if E else 0
        ids_nK, counts_E = (h_1nD.new_empty(shape, dtype=torch.int64) for shape in ((n, K), (E,)))
        scores_nE, weights_nK = (h_1nD.new_empty(n, width, dtype=torch.float32) for width in (E, K))
        if isinstance(mlp, DeepSeekMoE):
            router, bias = mlp.router.weight, mlp.router.e_score_correction_bias
        lib.block_between(
            *(attended_1nHV.data_ptr(), self._o, h_1nD.data_ptr()),
            *(self.block.post_attention_layernorm.weight.data_ptr(), config.rms_norm_eps),
            *(None if router is None else router.data_ptr(), None if bias is None else bias.data_ptr()),
            *(residual.data_ptr(), x.data_ptr(), scores_nE.data_ptr(), ids_nK.data_ptr(), weights_nK.data_ptr()),
            *(n, D, attended_1nHV.numel() // n, E, config.scoring_func == "softmax", K),
            *(1 if config.topk_method == "greedy" else config.n_group, config.topk_group),
            *(config.topk_method == "noaux_tc", config.norm_topk_prob, config.routed_scaling_factor, threads),
        )
        scratch = h_1nD.new_empty(n * (K * (2 * D + F + 6) + D + L + 2))
        lib.block_after(
            *(residual.data_ptr(), x.data_ptr(), ids_nK.data_ptr(), weights_nK.data_ptr()),
            *(self._local, self._local_down, self._gate_up, self._down),
            *(counts_E.data_ptr(), out.data_ptr(), scratch.data_ptr(), n, D, L, E, K, F, threads),
        )
        return out, Routing(ids_nK, weights_nK, scores_nE, counts_E) if E else None


def can_fuse(block: Block) -> bool:
    """Whether a block whose maps are packed has them as the kernels want them."""
    attn, mlp = block.self_attn, block.mlp
    maps = [attn.kv_a_proj_with_mqa, attn.o_proj]
    maps += [attn.q_proj] if attn.config.q_lora_rank is None else [attn.q_a_proj, attn.q_b_proj]
    local = mlp.shared_experts if isinstance(mlp, DeepSeekMoE) else mlp
    maps += [local.gate_up_proj, local.down_proj] if local is not None else []
    weights = [stored(linear) for linear in maps]
    if isinstance(mlp, DeepSeekMoE):
        weights += stored_experts(mlp.experts)
    sizes = (attn.config.kv_lora_rank, attn.config.qk_rope_head_dim, attn.config.hidden_size)
    return None not in weights and native.takes_block(*sizes, attn.config.n_routed_experts)


def stored(linear: nn.Module) -> Stored | None:
    """A packed map's weight as the kernels take it."""
    weight = getattr(linear, "weight_in_memory", None)
    return None if weight is None else weight()


def stored_experts(experts: nn.Module) -> tuple[Stored | None, Stored | None]:
    """The same of stacked experts, gate and up, then down."""
    if isinstance(experts, Experts):
        return (experts.gate_up_proj.detach(), None), (experts.down_proj.detach(), None)
    both = getattr(experts, "weights_in_memory", None)
    return (None, None) if both is None else both()


def _down(local: SwiGLU) -> Tensor:
    kept = stored(local.down_proj)
    assert kept is not None
    return kept[0]
