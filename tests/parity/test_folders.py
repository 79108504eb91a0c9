"""Checkpoint folders between the two: what one writes, the other reads as the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.names import canonical_tensors
from dsv3.checkpoint.pretrained import load_pretrained
from dsv3.config import ModelConfig
from tests.parity.configs import CASES, TINY
from tests.parity.twin import assert_close, clear_tokens, make_twin, their_tensor


@pytest.mark.parametrize("case", ["v3", "yarn, no q_lora", "moonlight", "v2 greedy", "v2 group_limited_greedy"])
def test_they_write_and_we_read(case: str, generator: torch.Generator, tmp_path: Path) -> None:
    twin = make_twin(CASES[case], tmp_path / "ours", generator)
    twin.theirs.save_pretrained(tmp_path / "theirs")
    again = load_pretrained(tmp_path / "theirs")
    # Their config.json has no place for these two.
    kept = ("initializer_range", "aux_loss_alpha")
    assert again.config.replace(**{name: getattr(twin.config, name) for name in kept}) == twin.config
    expected = twin.ours.state_dict()
    state = again.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_many_shards(generator: torch.Generator, tmp_path: Path) -> None:
    twin = make_twin(TINY.replace(num_nextn_predict_layers=1), tmp_path, generator, max_shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    tokens_BS = clear_tokens(twin.ours, 2, 20, generator)
    with torch.no_grad():
        assert_close("logits", twin.ours(tokens_BS).logits, twin.theirs(tokens_BS).logits)
    twin.their_mtp()  # raises if a tensor is missing


def test_fp8_blocks(generator: torch.Generator, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # without it transformers unpacks no FP8
    # Transformers takes a weight's rows over its scale's rows for the height of a block: right if the last one is
    # whole or the only one, wrong (for the release's kv_a_proj, an error) if it is partial.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_rope_head_dim": 12}
    config = TINY.replace(hidden_size=128, intermediate_size=256, **heads)
    twin = make_twin(config, tmp_path, generator, fp8=True)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    ours = load_pretrained(tmp_path, dtype=torch.float32)
    ours_state, original, theirs = ours.state_dict(), twin.ours.state_dict(), twin.theirs.state_dict()
    for tensor in canonical_tensors(config):
        assert torch.equal(tensor.view(ours_state), their_tensor(theirs, tensor.name)), tensor.name
        assert torch.equal(tensor.view(ours_state), tensor.view(original)) == (tensor.kind != "linear")
    tokens_BS = clear_tokens(ours, 2, 20, generator)
    with torch.no_grad():
        assert_close("logits", ours(tokens_BS).logits, twin.theirs(tokens_BS).logits)


def test_epsilon_of_the_latent_norms(generator: torch.Generator, tmp_path: Path) -> None:
    # Every norm of ours takes `rms_norm_eps`. In transformers those of the latents keep 1e-6 whatever the config
    # says, which shows with Moonlight's 1e-5; told the same epsilon, they give the same.
    config: ModelConfig = CASES["moonlight"].replace(q_lora_rank=36, rms_norm_eps=1e-3)
    twin = make_twin(config, tmp_path, generator)
    tokens_BS = clear_tokens(twin.ours, 2, 20, generator)
    with torch.no_grad():
        ours = twin.ours(tokens_BS).logits
        for layer in twin.theirs.model.layers:
            layer.self_attn.q_a_layernorm.variance_epsilon = config.rms_norm_eps
            layer.self_attn.kv_a_layernorm.variance_epsilon = config.rms_norm_eps
        assert_close("logits", ours, twin.theirs(tokens_BS).logits)
