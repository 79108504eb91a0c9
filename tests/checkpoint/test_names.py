"""The name mapping: it covers the model exactly, and adds up to the release."""

from __future__ import annotations

import math

import torch

from dsv3.checkpoint.encoding import entries_of, written_dtype
from dsv3.checkpoint.names import canonical_tensors
from dsv3.config import ModelConfig
from dsv3.model.transformer import Transformer


def test_every_element_of_the_model_has_one_name(config: ModelConfig) -> None:
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    count = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    for tensor in canonical_tensors(config):
        view = tensor.view(count)
        assert tuple(view.shape) == tensor.shape, tensor.name
        if tensor.copy_of is None:
            view += 1
    for name, times in count.items():
        assert (times == 1).all(), f"{name} is covered {times.min()} to {times.max()} times"


def test_names_are_distinct_and_copies_repeat_a_tensor(config: ModelConfig) -> None:
    tensors = {tensor.name: tensor for tensor in canonical_tensors(config)}
    assert len(tensors) == len(list(canonical_tensors(config)))
    copies = [tensor for tensor in tensors.values() if tensor.copy_of is not None]
    assert len(copies) == 2 * config.num_nextn_predict_layers
    for tensor in copies:
        assert tensor.copy_of is not None
        original = tensors[tensor.copy_of]
        assert (original.param, original.shape, original.copy_of) == (tensor.param, tensor.shape, None)


def test_the_release_has_these_parameters() -> None:
    tensors = [t for t in canonical_tensors(ModelConfig.preset("v3-671b")) if t.copy_of is None]
    mtp = sum(math.prod(t.shape) for t in tensors if t.param.startswith("mtp."))
    assert mtp == 11_610_068_224
    assert sum(math.prod(t.shape) for t in tensors) - mtp == 671_026_419_200


def test_the_release_in_fp8_has_these_tensors_and_bytes() -> None:
    """91,991 tensors of 688,574,839,360 bytes: published figures of the index. They pin down which tensors are
    FP8, that `eh_proj` and the router's weight are BF16, and that the routing bias is FP32."""
    entries = [
        entry
        for tensor in canonical_tensors(ModelConfig.preset("v3-671b"))
        for entry in entries_of(tensor, written_dtype(tensor, torch.bfloat16, None, fp8=True))
    ]
    assert len(entries) == 91_991
    assert sum(entry.nbytes for entry in entries) == 688_574_839_360


def test_spellings_of_the_release() -> None:
    shapes = {t.name: t.shape for t in canonical_tensors(ModelConfig.preset("v3-671b"))}
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (18432, 7168)
    assert shapes["model.layers.60.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert shapes["model.layers.3.mlp.gate.e_score_correction_bias"] == (256,)
    assert shapes["model.layers.61.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert shapes["model.layers.61.shared_head.norm.weight"] == (7168,)
    assert shapes["model.layers.61.shared_head.head.weight"] == shapes["model.layers.61.embed_tokens.weight"]
    assert "model.layers.2.mlp.gate.weight" not in shapes and "model.layers.3.mlp.gate_proj.weight" not in shapes


def test_view_finds_expert_and_half() -> None:
    config = ModelConfig.preset("micro")
    E, F, D = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    state = {"layers.1.mlp.experts.gate_up_proj": torch.arange(E * 2 * F * D).view(E, 2 * F, D)}
    (up,) = (t for t in canonical_tensors(config) if t.name == "model.layers.1.mlp.experts.5.up_proj.weight")
    assert torch.equal(up.view(state), state[up.param][5, F:])
