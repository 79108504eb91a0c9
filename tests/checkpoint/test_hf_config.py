"""config.json: the official schema out, both schemas in, everything else refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.checkpoint.hf_config import config_from_hf, config_to_hf, load_config, save_config
from dsv3.config import PRESETS, ModelConfig, RopeScaling
from dsv3.errors import UserError

OFFICIAL = json.loads((Path(__file__).parents[1] / "goldens" / "deepseek_v3_config.json").read_text(encoding="utf-8"))
V3 = ModelConfig.preset("v3-671b")


def transformers5(hf: dict[str, Any]) -> dict[str, Any]:
    """An official config in the words of transformers 5."""
    hf = dict(hf)
    for name in ("scoring_func", "topk_method", "moe_layer_freq", "aux_loss_alpha", "seq_aux", "ep_size"):
        hf.pop(name)
    theta, scaling = hf.pop("rope_theta"), hf.pop("rope_scaling")
    rope = {"rope_theta": theta, "rope_type": "default"}
    if scaling is not None:
        rope |= scaling | {"rope_type": "yarn"}
    hf["dtype"] = hf.pop("torch_dtype")
    heads = {"head_dim": hf["qk_rope_head_dim"], "qk_head_dim": hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]}
    rest = {"rope_interleave": True, "pad_token_id": None, "output_router_logits": False, "transformers_version": "5.0"}
    return hf | heads | rest | {"rope_parameters": rope}


def test_written_as_released() -> None:
    written = config_to_hf(V3, dtype=torch.bfloat16, fp8=True)
    skipped = {"auto_map", "transformers_version", "initializer_range"}
    assert {name: written.get(name) for name in OFFICIAL if name not in skipped} == {
        name: value for name, value in OFFICIAL.items() if name not in skipped
    }
    assert set(written) - set(OFFICIAL) == {"aux_loss_alpha", "pretraining_tp", "seq_aux"}
    assert list(written) == sorted(written)
    json.dumps(written, allow_nan=False)


def test_the_release_is_the_preset() -> None:
    with pytest.warns(UserWarning, match=r"initializer_range 0.02 \(trained with 0.006\)"):
        config = config_from_hf(OFFICIAL)
    assert config.replace(initializer_range=0.006) == V3


@pytest.mark.parametrize("name", PRESETS)
def test_presets_return(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_config(tmp_path, config_to_hf(PRESETS[name], dtype=torch.float32))
        assert load_config(tmp_path) == PRESETS[name]


@pytest.mark.parametrize("name", ["v3-671b", "micro", "v3-16b"])
def test_transformers_5_schema_means_the_same(name: str) -> None:
    config = PRESETS[name]
    assert config_from_hf(transformers5(config_to_hf(config, dtype=torch.bfloat16))) == config


def test_v2_lite() -> None:
    hf = config_to_hf(PRESETS["v3-16b"], dtype=torch.bfloat16) | {
        "model_type": "deepseek_v2",
        "n_group": None,
        "topk_group": None,
        "n_shared_experts": None,
        "num_key_value_heads": None,
        "norm_topk_prob": False,
        "topk_method": "greedy",
        "scoring_func": "softmax",
    }
    del hf["num_nextn_predict_layers"], hf["aux_loss_alpha"]
    config = config_from_hf(hf)
    assert (config.n_group, config.topk_group, config.n_shared_experts, config.num_key_value_heads) == (1, 1, 0, 16)
    assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == ("softmax", "greedy", False)
    assert (config.q_lora_rank, config.num_nextn_predict_layers) == (None, 0)
    del hf["scoring_func"], hf["norm_topk_prob"], hf["topk_method"]
    assert config_from_hf(hf) == config  # what model_type deepseek_v2 means


def test_model_type_follows_the_router() -> None:
    for name, model_type in (("v3-671b", "deepseek_v3"), ("v3-236b", "deepseek_v2")):
        hf = config_to_hf(PRESETS[name], dtype=torch.bfloat16)
        assert hf["model_type"] == model_type
        assert hf["architectures"] == [model_type.replace("deepseek_v", "DeepseekV") + "ForCausalLM"]


V2 = {"scoring_func": "softmax", "topk_method": "greedy", "num_nextn_predict_layers": 0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scoring_func": "softmax"}, "noaux_tc on softmax scores, .* sigmoid"),
        (V2 | {"scoring_func": "sigmoid", "norm_topk_prob": False}, "greedy on sigmoid scores, .* softmax"),
        (V2 | {"norm_topk_prob": True}, r"norm_topk_prob is true, .*\(model_type deepseek_v2\)"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        ({"rope_scaling": RopeScaling(4, 128, mscale=0.5, mscale_all_dim=0.0)}, "mscale 0.5 and mscale_all_dim 0.0"),
    ],
)
def test_what_other_readers_would_take_for_another_model_is_written_with_a_warning(
    changes: dict[str, Any], words: str
) -> None:
    config = PRESETS["micro"].replace(**changes)
    with pytest.warns(UserWarning, match=words) as caught:
        hf = config_to_hf(config, dtype=torch.float32)
    assert len(caught) == 1
    assert config_from_hf(hf) == config


@pytest.mark.parametrize(
    ("given", "mscale", "mscale_all_dim"),
    [({}, 1.0, 0.0), ({"mscale": 0.5}, 0.5, 0.0), ({"mscale_all_dim": 0.5}, 1.0, 0.5), ({"mscale": None}, 1.0, 0.0)],
)
def test_yarn_without_an_mscale_is_read_as_the_official_code_reads_it(
    given: dict[str, Any], mscale: float, mscale_all_dim: float
) -> None:
    hf = config_to_hf(V3, dtype=torch.bfloat16)
    hf["rope_scaling"] = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 4096} | given
    assert config_from_hf(hf).rope_scaling == RopeScaling(8, 4096, mscale=mscale, mscale_all_dim=mscale_all_dim)


@pytest.mark.parametrize(
    ("changes", "leftovers"),
    [
        ({"aux_loss_alpha": 0.001}, ["aux_loss_alpha"]),
        ({"aux_loss_alpha": 0.001, "initializer_range": 0.02}, ["aux_loss_alpha", "initializer_range"]),
        ({"aux_loss_alpha": 0.0001, "initializer_range": 0.02}, []),  # another trainer's own choice
        ({"initializer_range": 0.006}, []),
        ({"aux_loss_alpha": 0.001, "model_type": "deepseek_v2"}, []),  # the report says nothing of V2
    ],
)
def test_leftovers(changes: dict[str, Any], leftovers: list[str]) -> None:
    hf = config_to_hf(V3, dtype=torch.bfloat16) | changes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = config_from_hf(hf)
    assert config.initializer_range == hf["initializer_range"]  # what the file says stays
    assert len(caught) == bool(leftovers)
    for name in leftovers:
        assert name in str(caught[0].message)


YARN = OFFICIAL["rope_scaling"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_interleave": False}, ["rope_interleave", "True only"]),
        ({"attention_bias": True}, ["attention_bias", "False only"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings", "False only"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'silu' only"]),
        ({"attention_dropout": 0.1}, ["attention_dropout"]),
        ({"model_type": "deepseek_v32"}, ["model_type", "deepseek_v32", "deepseek_v3"]),
        ({"model_type": None}, ["model_type"]),
        ({"model_type": []}, ["model_type"]),
        ({"index_topk": 2048, "sliding_window": 5}, ["index_topk, sliding_window"]),
        ({"hidden_size": "7168"}, ["hidden_size", "'7168'", "a whole number"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": 64.0}, ["hidden_size"]),
        ({"norm_topk_prob": "yes"}, ["norm_topk_prob", "true or false"]),
        ({"q_lora_rank": "none"}, ["q_lora_rank"]),
        ({"eos_token_id": [1, 2]}, ["eos_token_id"]),
        ({"scoring_func": "tanh"}, ["scoring_func", "tanh"]),
        ({"topk_method": 3}, ["topk_method", "a string"]),
        ({"num_key_value_heads": 8}, ["num_key_value_heads"]),
        ({"head_dim": 128}, ["head_dim", "64"]),
        ({"qk_head_dim": 64}, ["qk_head_dim", "192"]),
        ({"rope_scaling": YARN | {"type": "linear"}}, ["rope_scaling", "linear"]),
        ({"rope_scaling": YARN | {"rope_type": "default"}}, ["rope_scaling", "yarn"]),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, ["rope_scaling", "attention_factor"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "factor, original_max_position_embeddings"]),
        ({"rope_scaling": YARN | {"factor": "40"}}, ["rope_scaling.factor", "'40'"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling", "object"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}, ["rope_scaling", "rope_parameters"]),
        ({"rope_parameters": YARN | {"rope_theta": 50000}}, ["rope_theta 10000", "rope_parameters.rope_theta 50000"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config.quant_method", "awq"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config.weight_block_size"]),
        (
            {"quantization_config": OFFICIAL["quantization_config"] | {"weight_block_size": [64, 64]}},
            ["weight_block_size", "[64, 64]"],
        ),
        ({"quantization_config": 8}, ["quantization_config"]),
    ],
)
def test_refused_by_name(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        config_from_hf(OFFICIAL | changes)
    for words in named:
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["n_group", "hidden_size", "kv_lora_rank", "q_lora_rank", "routed_scaling_factor"])
def test_what_shapes_the_function_may_not_be_left_out(name: str) -> None:
    with pytest.raises(UserError, match=f"config fields {name} are missing"):
        config_from_hf({key: value for key, value in OFFICIAL.items() if key != name})


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not JSON"), ("[1]", "a JSON list"), ('{"model_type": "gpt2"}', "gpt2"), (None, "cannot read")],
)
def test_bad_files_are_named(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value) and words in str(error.value)
