"""A DeepSeek-V3 checkpoint as the GGUF file that llama.cpp reads, with what llama.cpp's own environment has.

llama.cpp's converter is no part of its packages, so the few facts that this one model needs stand here: the names of
metadata and tensors under the architecture `deepseek2`, W_UK transposed head by head and W_UV beside it in place of
`kv_b_proj`, the experts of a layer in one tensor each for gate, up and down, norms and routers in FP32. The vocabulary
is made up: the text of a token is its number. MTP modules are left out: llama.cpp does not run them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

# In a layer, as the checkpoint names them, without ".weight".
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
# Where both count the same thing: what the writer calls it after "add_", and the config's field.
_METADATA = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "layer_norm_rms_eps": "rms_norm_eps",
    "head_count": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "rope_freq_base": "rope_theta",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(folder: Path, target: Path, *, q8_0: bool) -> None:
    """Write the BF16 checkpoint in `folder` to the file `target`, its matrices in BF16 or Q8_0."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "deepseek2")
    _write_metadata(writer, config, q8_0)
    _write_vocabulary(writer, config["vocab_size"])
    for name, tensor in _tensors(folder, config):
        matrix = tensor.ndim > 1 and "ffn_gate_inp" not in name
        kind = (Kind.Q8_0 if q8_0 else Kind.BF16) if matrix else Kind.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], q8_0: bool) -> None:
    assert config["model_type"] == "deepseek_v3" and config["rope_scaling"] is None, "no other model is written here"
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if q8_0 else gguf.LlamaFileType.MOSTLY_BF16)
    for theirs, ours in _METADATA.items():
        if config[ours] is not None:
            getattr(writer, f"add_{theirs}")(config[ours])
    # Attention is absorbed: all heads share the latent and the rotated key as their one key.
    writer.add_head_count_kv(1)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _write_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"▁{token}" for token in range(size)])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_add_bos_token(False)


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF name and FP32 values of every tensor of the main model."""
    H, E = config["num_attention_heads"], config["n_routed_experts"]
    stored = _Stored(folder)
    for theirs, ours in _WHOLE.items():
        yield f"{ours}.weight", stored[f"{theirs}.weight"]
    for layer in range(config["num_hidden_layers"]):
        of_layer, to = f"model.layers.{layer}.", f"blk.{layer}."
        for theirs, ours in _LAYER.items():
            if (name := f"{of_layer}{theirs}.weight") in stored:
                yield f"{to}{ours}.weight", stored[name]
        kv_b_HNC = stored[f"{of_layer}self_attn.kv_b_proj.weight"].reshape(H, -1, config["kv_lora_rank"])
        nope = config["qk_nope_head_dim"]
        yield f"{to}attn_k_b.weight", np.ascontiguousarray(kv_b_HNC[:, :nope].transpose(0, 2, 1))
        yield f"{to}attn_v_b.weight", np.ascontiguousarray(kv_b_HNC[:, nope:])
        if f"{of_layer}mlp.gate.weight" in stored:
            yield f"{to}exp_probs_b.bias", stored[f"{of_layer}mlp.gate.e_score_correction_bias"]
            for part in ("gate", "up", "down"):
                experts = [stored[f"{of_layer}mlp.experts.{e}.{part}_proj.weight"] for e in range(E)]
                yield f"{to}ffn_{part}_exps.weight", np.stack(experts)


class _Stored:
    """The tensors of a folder of safetensors files, BF16 and FP32, read as FP32 when asked for.

    (The library of that format gives NumPy no BF16.)
    """

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, tuple[np.memmap, dict[str, Any]]] = {}
        for path in folder.glob("*.safetensors"):
            data = np.memmap(path, mode="r")
            size = int.from_bytes(data[:8].tobytes(), "little")
            header = json.loads(data[8 : 8 + size].tobytes())
            self._where |= {name: (data[8 + size :], info) for name, info in header.items() if name != "__metadata__"}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> np.ndarray:
        data, info = self._where[name]
        raw = data[slice(*info["data_offsets"])]
        assert info["dtype"] in ("BF16", "F32"), f"{name} is in {info['dtype']}, expected BF16 or FP32"
        if info["dtype"] == "BF16":  # the upper half of an FP32
            raw = raw.view(np.uint16).astype(np.uint32) << 16
        return raw.view(np.float32).reshape(info["shape"])
