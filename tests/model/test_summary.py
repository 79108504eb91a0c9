"""The figures of the report, counted on the model itself."""

from __future__ import annotations

import pytest
import torch

from dsv3.config import ModelConfig
from dsv3.model.summary import summarise
from dsv3.model.transformer import Transformer
from tests.variants import VARIANTS


def test_deepseek_v3_has_671_billion_parameters():
    summary = summarise(ModelConfig.preset("v3-671b"))
    parameters = summary["parameters"]
    assert parameters["total"] == 671_026_419_200
    assert parameters["mtp"] == 11_610_068_224
    assert parameters["activated_without_embedding_and_head"] == 35_698_939_392
    assert parameters["activated_with_head"] == 36_625_618_432
    assert parameters["activated"] == 37_552_297_472
    assert parameters["mla_per_layer"] == 187_107_328
    assert summary["experts"] == {
        "moe_layers": 58,
        "per_layer": 257,
        "total": 14_906,
        "active_per_layer": 9,
        "active_total": 522,
    }
    assert summary["kv_cache"]["bytes_per_token_bf16"] == 70_272
    assert summary["kv_cache"]["values_per_token_and_layer"] == 576
    assert summary["kv_cache"]["values_per_token_and_layer_of_mha"] == 32_768


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_tensor_is_counted_once(config):
    state = {name: tensor.numel() for name, tensor in Transformer(config).state_dict().items()}
    parameters = summarise(config)["parameters"]
    assert parameters["mtp"] == sum(n for name, n in state.items() if name.startswith("mtp."))
    assert parameters["total"] == sum(state.values()) - parameters["mtp"] == sum(parameters["by_part"].values())
    # What no token reaches in one go: the weights of the experts it was not sent to.
    stacked = [name for name in state if name.startswith("layers.") and ".experts." in name and ".shared" not in name]
    share = 1 - config.num_experts_per_tok / config.n_routed_experts
    idle = sum(state[name] for name in stacked) * share
    assert parameters["activated"] == pytest.approx(parameters["total"] - idle)


def test_counting_allocates_no_memory():
    with torch.device("meta"):
        assert Transformer(VARIANTS["v3"]).lm_head.weight.is_meta
    assert summarise(ModelConfig.preset("v3-236b"))["parameters"]["total"] > 2e11
