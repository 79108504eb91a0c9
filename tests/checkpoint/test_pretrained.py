"""Models to folders and back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.hf_config import load_config
from dsv3.checkpoint.pretrained import load_pretrained, save_pretrained
from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.ops.fp8 import dequantize_blocks, quantize_blocks
from tests.checkpoint.helpers import edit_shard, read_folder, same

MakeModel = Callable[..., Transformer]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_returns_bit_by_bit(
    config: ModelConfig, dtype: torch.dtype, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(config, dtype)
    save_pretrained(model, tmp_path / "m", max_shard_bytes=100_000)
    loaded = load_pretrained(tmp_path / "m")
    assert loaded.config == config and not loaded.training
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert list(state) == list(loaded_state)
    for name, tensor in state.items():
        assert same(tensor, loaded_state[name]), name


def test_the_loaded_model_runs_and_trains_alike(make_model: MakeModel, seed: int, tmp_path: Path) -> None:
    model = make_model("v3-yarn-2mtp")
    save_pretrained(model, tmp_path / "m")
    loaded = load_pretrained(tmp_path / "m")
    torch.manual_seed(seed)
    tokens_BS = torch.randint(model.config.vocab_size, (2, 20))
    out, loaded_out = model(tokens_BS), loaded(tokens_BS)
    assert torch.equal(out.logits, loaded_out.logits)
    assert all(torch.equal(a, b) for a, b in zip(out.mtp_logits, loaded_out.mtp_logits, strict=True))
    loaded_out.logits.sum().backward()
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.layers[1].mlp.experts.down_proj.grad is not None


def test_a_folder_returns_bit_by_bit(config: ModelConfig, make_model: MakeModel, tmp_path: Path) -> None:
    save_pretrained(make_model(config), tmp_path / "a", dtype=torch.bfloat16)
    save_pretrained(load_pretrained(tmp_path / "a"), tmp_path / "b", dtype=torch.bfloat16)
    a, b = read_folder(tmp_path / "a"), read_folder(tmp_path / "b")
    assert a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


def test_fp8_payloads_return_through_a_model(fp8_folder: Path, tmp_path: Path) -> None:
    save_pretrained(load_pretrained(fp8_folder, dtype=torch.float32), tmp_path / "b", dtype=torch.bfloat16, fp8=True)
    a, b = read_folder(fp8_folder), read_folder(tmp_path / "b")
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith("_scale_inv"):  # amax / 448 of a product rounded to FP32: one bit of it may move
            torch.testing.assert_close(a[name], b[name], rtol=2**-22, atol=0)
        else:
            assert same(a[name], b[name]), name


def test_fp8_is_read_as_payload_times_scale(fp8_folder: Path) -> None:
    files = read_folder(fp8_folder)
    loaded = load_pretrained(fp8_folder, dtype=torch.float32)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    weight = loaded.layers[2].mlp.experts.gate_up_proj[3, loaded.config.moe_intermediate_size :]
    assert files[name].dtype == torch.float8_e4m3fn and files[name + "_scale_inv"].shape == (2, 2)
    assert torch.equal(weight, dequantize_blocks(files[name], files[name + "_scale_inv"]))
    assert load_pretrained(fp8_folder).lm_head.weight.dtype == torch.bfloat16


def test_fp8_goes_where_the_release_has_it(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("v3-blocks")
    save_pretrained(model, tmp_path / "m", dtype=torch.bfloat16, fp8=True)
    files = read_folder(tmp_path / "m")
    plain = ("embed_tokens", "lm_head", "shared_head", "norm", "eh_proj", "mlp.gate.")
    for name, tensor in files.items():
        if name.endswith("_scale_inv") or "e_score" in name:
            assert tensor.dtype == torch.float32, name
        elif any(part in name for part in plain):
            assert tensor.dtype == torch.bfloat16, name
        else:
            assert tensor.dtype == torch.float8_e4m3fn and name + "_scale_inv" in files, name
    # Quantised from the model's own FP32 weights, not from their BF16 roundings.
    q, scale = quantize_blocks(model.layers[0].mlp.down_proj.weight)
    assert same(files["model.layers.0.mlp.down_proj.weight"], q)
    assert same(files["model.layers.0.mlp.down_proj.weight_scale_inv"], scale)


def test_router_and_bias_keep_fp32(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    router = model.layers[1].mlp.router
    router.e_score_correction_bias.fill_(5.001)  # in BF16 this is 5
    save_pretrained(model, tmp_path / "m", dtype=torch.bfloat16)
    loaded = load_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    loaded_router = loaded.layers[1].mlp.router
    assert same(loaded_router.e_score_correction_bias, router.e_score_correction_bias)
    assert loaded_router.weight.dtype == torch.float32
    assert torch.equal(loaded_router.weight, router.weight.to(torch.bfloat16).float())
    assert loaded.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16


def test_a_bias_that_others_rounded_is_read(folder: Path) -> None:
    def round_biases(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.bfloat16)

    for shard in range(len(list(folder.glob("*.safetensors")))):
        edit_shard(folder, round_biases, shard)
    loaded = load_pretrained(folder)
    assert loaded.layers[1].mlp.router.e_score_correction_bias.dtype == torch.float32


def test_mtp_is_layer_number_num_hidden_layers_with_its_copies(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("v3-yarn-2mtp")
    save_pretrained(model, tmp_path / "m")
    files = read_folder(tmp_path / "m")
    for k in range(2):
        to = f"model.layers.{model.config.num_hidden_layers + k}."
        assert same(files[f"{to}eh_proj.weight"], model.mtp[k].eh_proj.weight)
        assert same(files[f"{to}shared_head.norm.weight"], model.mtp[k].norm.weight)
        assert same(files[f"{to}embed_tokens.weight"], model.embed_tokens.weight)
        assert same(files[f"{to}shared_head.head.weight"], model.lm_head.weight)


def test_mtp_copies_warn_when_they_differ_and_may_be_missing(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.shared_head.head.weight"] += 1

    edit_shard(folder, change, shard=-1)
    with pytest.warns(UserWarning, match="layers.3.shared_head.head.weight differs from lm_head.weight"):
        load_pretrained(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.3.shared_head.head.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(folder)


def test_mtp_promised_but_wholly_absent_is_left_out_with_a_warning(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("moonlight")
    save_pretrained(model, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(file.read_text().replace('"num_nextn_predict_layers": 0', '"num_nextn_predict_layers": 1'))
    with pytest.warns(UserWarning, match="promises 1 MTP module"):
        loaded = load_pretrained(tmp_path / "m")
    assert len(loaded.mtp) == 0 and loaded.config.num_nextn_predict_layers == 0


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    before = torch.get_rng_state()
    load_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_config_says_what_the_files_hold(make_model: MakeModel, tmp_path: Path) -> None:
    for dtype, fp8, name in ((None, False, "float32"), (torch.bfloat16, True, "bfloat16")):
        save_pretrained(make_model(), tmp_path / name, dtype=dtype, fp8=fp8)
        hf = json.loads((tmp_path / name / "config.json").read_text())
        assert hf["torch_dtype"] == name and ("quantization_config" in hf) == fp8
        assert load_config(tmp_path / name) == make_model().config


def test_nan_weights_are_not_written_as_fp8(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.layers[1].mlp.experts.gate_up_proj[5, 40, 3] = float("nan")
    with pytest.raises(UserError, match=r"model.layers.1.mlp.experts.5.up_proj.weight has NaN"):
        save_pretrained(model, tmp_path / "m", fp8=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_dtypes_that_hold_no_weights(dtype: torch.dtype, folder: Path, make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected one of .*torch.bfloat16"):
        load_pretrained(folder, dtype=dtype)
    with pytest.raises(UserError, match=r"expected one of .*torch.bfloat16"):
        save_pretrained(make_model(), tmp_path / "m", dtype=dtype)
