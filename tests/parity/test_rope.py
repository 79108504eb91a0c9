"""RoPE and YaRN at the sizes of the released models, where building the model itself would be too much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale

from dsv3.checkpoint.hf_config import config_to_hf
from dsv3.config import ModelConfig
from dsv3.model.rope import cos_sin, inverse_frequencies, softmax_scale


@pytest.mark.parametrize("preset", ["v3-16b", "v3-236b", "v3-671b"])
def test_frequencies_and_scales(preset: str, tmp_path: Path) -> None:
    config = ModelConfig.preset(preset)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config, dtype=torch.bfloat16)))
    their_config = AutoConfig.from_pretrained(tmp_path)
    their_rope = DeepseekV3RotaryEmbedding(their_config)

    # Equal up to one rounding, since they divide by s before and we after inverting.
    frequencies = inverse_frequencies(config)
    torch.testing.assert_close(frequencies, their_rope.inv_freq, rtol=2e-7, atol=0)
    their_scale = yarn_apply_mscale(their_config.rope_parameters, config.qk_head_dim**-0.5)
    assert softmax_scale(config) == pytest.approx(their_scale, rel=1e-14)

    # The same frequencies give the same angles up to the last position.
    positions = torch.arange(0, config.max_position_embeddings, 37).unsqueeze(0)
    their_rope.inv_freq.copy_(frequencies)
    their_cos, their_sin = their_rope(torch.zeros(1), positions)
    cos, sin = cos_sin(config, frequencies, positions)
    pairs = config.qk_rope_head_dim // 2
    torch.testing.assert_close(cos, their_cos[..., :pairs], rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, their_sin[..., :pairs], rtol=0, atol=1e-6)
