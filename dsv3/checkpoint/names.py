"""The one mapping between canonical (Hugging Face) tensor names and the parameters of `Transformer`.

Files name every expert and every half of a SwiGLU by itself; the model keeps experts stacked and gate and up
fused, because that is how they run. Saving, loading, inspecting, converting and resharding all walk the list
that `canonical_tensors` makes and know no name of their own. MTP module k is layer `num_hidden_layers + k`,
with copies of the embedding and the head that the model shares (spec section 13).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dsv3.config import ModelConfig

# What may become of a tensor's dtype:
#   linear  a weight of a Linear: any dtype, FP8 blocks too
#   router  the gate's weight: any dtype in a file, at least FP32 in the model
#   bias    e_score_correction_bias: FP32 everywhere (released values are near 5, where a BF16 step is 31 gammas)
#   plain   embedding, head, norms, eh_proj: any dtype but FP8
# The release stores exactly the `linear` ones in FP8: its index has a `weight_scale_inv` for no other.
Kind = Literal["linear", "router", "bias", "plain"]


@dataclass(frozen=True)
class CanonicalTensor:
    """One tensor of a checkpoint and where the model keeps it."""

    name: str  # in the files
    shape: tuple[int, ...]
    param: str  # key in Transformer.state_dict()
    kind: Kind
    expert: int | None = None  # index into a stacked parameter
    rows: tuple[int, int] | None = None  # rows [begin, end) of a fused parameter
    copy_of: str | None = None  # canonical name of the tensor this one repeats (MTP's embedding and head)

    def view(self, state: Mapping[str, Tensor]) -> Tensor:
        """This tensor as a view into a state dict, to read or to write."""
        tensor = state[self.param]
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.rows is not None:
            tensor = tensor[slice(*self.rows)]
        return tensor


def canonical_tensors(config: ModelConfig) -> Iterator[CanonicalTensor]:
    """Every tensor of a checkpoint of `config`, layer by layer, the MTP modules last."""
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    yield CanonicalTensor("model.embed_tokens.weight", (V, D), "embed_tokens.weight", "plain")
    for i in range(L):
        yield from _block(config, i, f"layers.{i}.")
    yield CanonicalTensor("model.norm.weight", (D,), "norm.weight", "plain")
    yield CanonicalTensor("lm_head.weight", (V, D), "lm_head.weight", "plain")
    for k in range(config.num_nextn_predict_layers):
        to, at = f"model.layers.{L + k}.", f"mtp.{k}."
        yield CanonicalTensor(
            f"{to}embed_tokens.weight", (V, D), "embed_tokens.weight", "plain", copy_of="model.embed_tokens.weight"
        )
        for norm in ("enorm", "hnorm"):
            yield CanonicalTensor(f"{to}{norm}.weight", (D,), f"{at}{norm}.weight", "plain")
        yield CanonicalTensor(f"{to}eh_proj.weight", (D, 2 * D), f"{at}eh_proj.weight", "plain")
        yield from _block(config, L + k, f"{at}block.")
        yield CanonicalTensor(f"{to}shared_head.norm.weight", (D,), f"{at}norm.weight", "plain")
        yield CanonicalTensor(
            f"{to}shared_head.head.weight", (V, D), "lm_head.weight", "plain", copy_of="lm_head.weight"
        )


def _block(config: ModelConfig, layer: int, at: str) -> Iterator[CanonicalTensor]:
    to, D = f"model.layers.{layer}.", config.hidden_size
    yield CanonicalTensor(f"{to}input_layernorm.weight", (D,), f"{at}input_layernorm.weight", "plain")
    yield from _attention(config, f"{to}self_attn.", f"{at}self_attn.")
    yield CanonicalTensor(f"{to}post_attention_layernorm.weight", (D,), f"{at}post_attention_layernorm.weight", "plain")
    to, at = f"{to}mlp.", f"{at}mlp."
    if not config.is_moe_layer(layer):
        yield from _swiglu(D, config.intermediate_size, to, at)
        return
    E, F = config.n_routed_experts, config.moe_intermediate_size
    yield CanonicalTensor(f"{to}gate.weight", (E, D), f"{at}router.weight", "router")
    if config.topk_method == "noaux_tc":
        bias = "e_score_correction_bias"
        yield CanonicalTensor(f"{to}gate.{bias}", (E,), f"{at}router.{bias}", "bias")
    for e in range(E):
        yield from _swiglu(D, F, f"{to}experts.{e}.", f"{at}experts.", expert=e)
    if config.n_shared_experts:
        yield from _swiglu(D, config.n_shared_experts * F, f"{to}shared_experts.", f"{at}shared_experts.")


def _attention(config: ModelConfig, to: str, at: str) -> Iterator[CanonicalTensor]:
    D, H, C = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    shapes: dict[str, tuple[int, ...]] = {}
    if config.q_lora_rank is None:
        shapes["q_proj"] = (H * config.qk_head_dim, D)
    else:
        shapes["q_a_proj"] = (config.q_lora_rank, D)
        shapes["q_a_layernorm"] = (config.q_lora_rank,)
        shapes["q_b_proj"] = (H * config.qk_head_dim, config.q_lora_rank)
    shapes["kv_a_proj_with_mqa"] = (C + config.qk_rope_head_dim, D)
    shapes["kv_a_layernorm"] = (C,)
    shapes["kv_b_proj"] = (H * (config.qk_nope_head_dim + config.v_head_dim), C)
    shapes["o_proj"] = (D, H * config.v_head_dim)
    for name, shape in shapes.items():
        kind: Kind = "linear" if len(shape) == 2 else "plain"
        yield CanonicalTensor(f"{to}{name}.weight", shape, f"{at}{name}.weight", kind)


def _swiglu(D: int, F: int, to: str, at: str, expert: int | None = None) -> Iterator[CanonicalTensor]:
    """gate, up and down of one SwiGLU of width F. Stacked experts are bare parameters, without `.weight`."""
    suffix = ".weight" if expert is None else ""
    fused = f"{at}gate_up_proj{suffix}"
    yield CanonicalTensor(f"{to}gate_proj.weight", (F, D), fused, "linear", expert, (0, F))
    yield CanonicalTensor(f"{to}up_proj.weight", (F, D), fused, "linear", expert, (F, 2 * F))
    yield CanonicalTensor(f"{to}down_proj.weight", (D, F), f"{at}down_proj{suffix}", "linear", expert)
