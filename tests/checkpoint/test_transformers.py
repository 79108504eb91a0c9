"""What we write, transformers loads and computes alike; what it writes, we load."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint.hf_config import config_to_hf, load_config, save_config
from dsv3.checkpoint.pretrained import load_pretrained, save_pretrained
from dsv3.config import PRESETS, RopeScaling
from dsv3.model.rope import cos_sin
from dsv3.model.transformer import Transformer
from tests.checkpoint.helpers import CONFIGS, read_folder, same

transformers = pytest.importorskip("transformers")
modeling_deepseek_v3 = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
MakeModel = Callable[..., Transformer]

RELEASED_SHAPES = ["v3", "v3-yarn-2mtp", "v3-blocks", "v2", "v2-lite", "moonlight"]


def load(path: Path, dtype: torch.dtype) -> Any:
    """A transformers model from our folder; fails on a missing, unexpected or mismatched tensor.

    Tensors of MTP layers are not the causal model's: transformers loads them apart, and only when drafting.
    """
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    first_mtp = model.config.num_hidden_layers
    unexpected = {name for name in info["unexpected_keys"] if int(name.split(".")[2]) < first_mtp}
    assert (info["missing_keys"], unexpected, info["mismatched_keys"]) == (set(), set(), set())
    return model.eval()


@pytest.mark.parametrize("name", ["v3-671b", "v3-236b", "v3-16b", "micro"])
def test_config_is_read_alike(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]
    save_config(tmp_path, config_to_hf(config, dtype=torch.bfloat16, fp8=True))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    rope = theirs.rope_parameters
    assert rope["rope_theta"] == config.rope_theta
    if config.rope_scaling is None:
        assert rope["rope_type"] == "default"
    else:
        assert rope["rope_type"] == "yarn"
        for field in (
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
        ):
            assert rope[field] == getattr(config.rope_scaling, field)
    for field in ("q_lora_rank", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "v_head_dim"):
        assert getattr(theirs, field) == getattr(config, field)
    assert theirs.model_type == ("deepseek_v2" if name == "v3-236b" else "deepseek_v3")
    assert theirs.dtype == torch.bfloat16
    assert theirs.quantization_config["weight_block_size"] == [128, 128]


@pytest.mark.parametrize("mscale_all_dim", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mscale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("factor", [1.0, 40.0])
def test_yarn_scales_alike_or_a_warning_says_that_it_does_not(
    factor: float, mscale: float, mscale_all_dim: float, tmp_path: Path
) -> None:
    scaling = RopeScaling(factor, 128, mscale=mscale, mscale_all_dim=mscale_all_dim)
    config = PRESETS["micro"].replace(rope_scaling=scaling)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_config(tmp_path, config_to_hf(config, dtype=torch.float32))
    theirs = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    ours, _ = cos_sin(config, torch.zeros(1), torch.zeros(1))
    assert (ours.item() == pytest.approx(theirs.attention_scaling)) == (not caught)


@pytest.mark.parametrize("name", RELEASED_SHAPES)
def test_logits_are_alike(name: str, make_model: MakeModel, tmp_path: Path, generator: torch.Generator) -> None:
    model = make_model(name)
    save_pretrained(model, tmp_path / "m", max_shard_bytes=500_000)
    theirs = load(tmp_path / "m", torch.float32)
    tokens_BS = torch.randint(model.config.vocab_size, (2, 50), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BS).logits, theirs(tokens_BS).logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["v3", "v2-lite"])
def test_what_transformers_saves_is_read(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(CONFIGS[name].replace(num_nextn_predict_layers=0))
    save_pretrained(model, tmp_path / "ours")
    load(tmp_path / "ours", torch.float32).save_pretrained(tmp_path / "theirs")
    assert '"rope_parameters"' in (tmp_path / "theirs" / "config.json").read_text()
    back = load_pretrained(tmp_path / "theirs")
    # It knows no aux_loss_alpha, and takes the router from the model type.
    assert back.config == model.config.replace(aux_loss_alpha=load_config(tmp_path / "theirs").aux_loss_alpha)
    state, back_state = model.state_dict(), back.state_dict()
    assert state.keys() == back_state.keys() and all(torch.equal(state[key], back_state[key]) for key in state)


def test_fp8_is_unpacked_alike(make_model: MakeModel, tmp_path: Path) -> None:
    """At sizes within one block: transformers 5.23 takes partial last blocks for wider ones."""
    pytest.importorskip("accelerate")
    save_pretrained(make_model("v3"), tmp_path / "ours", dtype=torch.bfloat16, fp8=True)
    theirs = load(tmp_path / "ours", torch.bfloat16)
    theirs.config.quantization_config = None
    save_pretrained(load_pretrained(tmp_path / "ours"), tmp_path / "unpacked", dtype=torch.bfloat16)
    files = read_folder(tmp_path / "unpacked")
    compared = 0
    for name, tensor in theirs.state_dict().items():
        if name in files:
            assert same(tensor, files[name]), name
            compared += 1
        elif name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for e, fused in enumerate(tensor):
                halves = (files[f"{prefix}{e}.{half}_proj.weight"] for half in ("gate", "up"))
                assert same(fused, torch.cat(tuple(halves))), name
                compared += 1
    assert compared > 40


def test_mtp_modules_are_loaded(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has no MTP modules")
    model = make_model("v3")
    save_pretrained(model, tmp_path / "m")
    theirs = load(tmp_path / "m", torch.float32)
    # It looks for the release's layer number; ours is 3.
    monkeypatch.setattr(theirs, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\."])
    mtp = layers.MtpModel.from_pretrained(theirs).state_dict()  # raises if a weight is missing
    assert torch.equal(mtp["layers.0.eh_proj.weight"], model.mtp[0].eh_proj.weight)
    assert torch.equal(mtp["layers.0.post_norm.weight"], model.mtp[0].norm.weight)
    assert torch.equal(mtp["layers.0.mtp_block.mlp.experts.down_proj"], model.mtp[0].block.mlp.experts.down_proj)
