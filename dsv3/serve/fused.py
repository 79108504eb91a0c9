"""A block on a few tokens in one native call.

To a decoding sequence a block is some sixty operations, each of which takes longer to begin than to run. Here they are
one. The function is `Block`'s, the weights are its own (BF16, or integers), and whatever that call does not take goes
to the block itself.

Shapes: n tokens (one row, as the engine packs them), D model, K experts chosen of E.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from dsv3.model.block import Block
from dsv3.model.context import Context
from dsv3.model.experts import DeepSeekMoE, Experts
from dsv3.model.router import Routing
from dsv3.ops import native
from dsv3.ops.native import Stored, bf16_weight
from dsv3.serve.packed_modules import PackedLinear, PackedUpProjection, QuantizedExperts
from dsv3.serve.paged_cache import PagedPass

_FEW_TOKENS = 32  # up to there this is faster than oneDNN on packed weights, operation by operation


class FusedBlock(nn.Module):
    """Takes the place of a `Block` whose maps are packed (`can_fuse`)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        config = block.self_attn.config
        self._stored = _stored(block)
        self._described = _described(block, self._stored)
        # Kept, as the maps are: the kernel has only addresses, and a module that is moved lets its tensors go.
        self._kept = [tensor.detach() for tensor in (*block.parameters(), *block.buffers())]
        self._num_experts = config.n_routed_experts if isinstance(block.mlp, DeepSeekMoE) else 0
        self._num_chosen = config.num_experts_per_tok if self._num_experts else 0

    def forward(self, h_BSD: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
        passed, n = context.cache, h_BSD.shape[1]
        fused = isinstance(passed, PagedPass) and (
            h_BSD.shape[:2] == (1, passed.num_tokens) and (n <= _FEW_TOKENS or passed.always_fused)
        )
        if not (fused and native.usable(h_BSD) and h_BSD.is_contiguous()):
            through_block: tuple[Tensor, Routing | None] = self.block(h_BSD, context)
            return through_block
        E, K = self._num_experts, self._num_chosen
        out_BSD = torch.empty_like(h_BSD)
        ids_nK, counts_E = (h_BSD.new_empty(shape, dtype=torch.int64) for shape in ((n, K), (E,)))
        scores_nE, weights_nK = (h_BSD.new_empty(n, width, dtype=torch.float32) for width in (E, K))
        assert isinstance(passed, PagedPass)
        native.loaded().run_block(
            *(ctypes.byref(self._described), ctypes.byref(passed.described(context.cos, context.sin))),
            *(h_BSD.data_ptr(), passed.address(self.block.self_attn.layer), out_BSD.data_ptr()),
            *(scores_nE.data_ptr(), ids_nK.data_ptr(), weights_nK.data_ptr(), counts_E.data_ptr()),
            torch.get_num_threads(),
        )
        return out_BSD, Routing(ids_nK, weights_nK, scores_nE, counts_E) if E else None


def can_fuse(block: Block) -> bool:
    """Whether the kernel takes a block whose maps are packed."""
    config, weights = block.self_attn.config, _stored(block)
    if not all(stored is not None and stored.is_taken for stored in weights.values()):
        return False
    kinds = {name: None if stored is None else stored.weight.dtype for name, stored in weights.items()}
    if kinds.get("gate_up") != kinds.get("down") or kinds.get("local_gate_up") != kinds.get("local_down"):
        return False
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        expected = torch.float32 if "router" in name else torch.bfloat16
        if tensor.dtype != expected:
            return False
    sizes = config.kv_lora_rank, config.qk_rope_head_dim, config.v_head_dim, config.hidden_size
    return native.takes_block(*sizes, config.n_routed_experts)


def _stored(block: Block) -> dict[str, Stored | None]:
    """The weights of the block's maps by their names in `native.Block`; None where the kernel has no form for one."""
    attn, mlp = block.self_attn, block.mlp
    low = attn.config.q_lora_rank is not None
    maps = {"q_b": attn.q_b_proj if low else attn.q_proj, "kv_a": attn.kv_a_proj_with_mqa, "o": attn.o_proj}
    if low:
        maps["q_a"] = attn.q_a_proj
    local = mlp.shared_experts if isinstance(mlp, DeepSeekMoE) else mlp
    if local is not None:
        maps |= {"local_gate_up": local.gate_up_proj, "local_down": local.down_proj}
    weights = {name: linear.in_memory() if isinstance(linear, PackedLinear) else None for name, linear in maps.items()}
    if isinstance(mlp, DeepSeekMoE):
        experts: nn.Module = mlp.experts
        if isinstance(experts, Experts):
            both: tuple[Stored | None, ...] = tuple(
                bf16_weight(weight.detach()) for weight in (experts.gate_up_proj, experts.down_proj)
            )
        else:
            both = experts.in_memory() if isinstance(experts, QuantizedExperts) else (None, None)
        weights |= dict(zip(("gate_up", "down"), both, strict=True))
    return weights


def _described(block: Block, weights: dict[str, Stored | None]) -> native.Block:
    attn, mlp, config = block.self_attn, block.mlp, block.self_attn.config
    assert isinstance(attn.kv_b_proj, PackedUpProjection)
    described = native.Block(
        input_norm=block.input_layernorm.weight.data_ptr(),
        kv_norm=attn.kv_a_layernorm.weight.data_ptr(),
        up=attn.kv_b_proj.by_head().data_ptr(),
        post_norm=block.post_attention_layernorm.weight.data_ptr(),
        D=config.hidden_size,
        H=config.num_attention_heads,
        N=config.qk_nope_head_dim,
        R=config.qk_rope_head_dim,
        V=config.v_head_dim,
        Q=config.q_lora_rank or 0,
        C=config.kv_lora_rank,
        eps=config.rms_norm_eps,
        scale=attn.scale,
        **{name: stored.map for name, stored in weights.items() if stored is not None},
    )
    if config.q_lora_rank is not None:
        described.q_norm = attn.q_a_layernorm.weight.data_ptr()
    local_down = weights.get("local_down")
    described.L = 0 if local_down is None else local_down.num_inputs
    if isinstance(mlp, DeepSeekMoE):
        bias = mlp.router.e_score_correction_bias
        described.router, described.bias = mlp.router.weight.data_ptr(), None if bias is None else bias.data_ptr()
        described.E, described.chosen = config.n_routed_experts, config.num_experts_per_tok
        described.F, described.softmax = config.moe_intermediate_size, config.scoring_func == "softmax"
        described.groups = 1 if config.topk_method == "greedy" else config.n_group
        described.kept, described.pairs = config.topk_group, config.topk_method == "noaux_tc"
        described.normalised, described.factor = config.norm_topk_prob, config.routed_scaling_factor
    return described
