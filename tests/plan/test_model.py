"""`plan model` against the published numbers, and against the model itself."""

import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import dsv3.model.experts
import dsv3.ops.attention
from dsv3.config import PRESETS, ModelConfig
from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.ops.attention import reference_attention
from dsv3.plan.model import attention_flops, checkpoint_bytes, plan_model, render
from tests.variants import BASE, VARIANTS, random_model, random_tokens

V3 = ModelConfig.preset("v3-671b")
CONFIGS = {**PRESETS, **VARIANTS}


def test_published_counts_of_v3_are_exact() -> None:
    plan = plan_model(V3)
    assert plan.total == 671_026_419_200
    assert plan.activated == 35_698_939_392
    assert plan.activated_with_head == 36_625_618_432
    assert plan.activated_with_head_and_embedding == 37_552_297_472
    assert plan.mtp_modules == (11_610_068_224,)
    assert plan.attention_per_layer == 187_107_328
    assert (plan.moe_layers, plan.experts_per_layer, plan.experts, plan.active_experts) == (58, 257, 14_906, 522)
    assert plan.cache.bytes_per_token == 70_272
    assert (plan.cache.values_per_layer, plan.cache.mha_values_per_layer) == (576, 32_768)


def test_flops_are_those_of_the_published_table() -> None:
    """arXiv 2505.09343, table 2: 250 GFLOP a token to train V3, 155 for V2, at 4,096 tokens."""
    assert round(plan_model(V3, context=4096).flops.training / 1e9) == 250
    assert round(plan_model(ModelConfig.preset("v3-236b"), context=4096).flops.training / 1e9) == 155


def test_fp8_checkpoint_has_the_size_of_the_released_files() -> None:
    """The 163 released files are 688,586,727,753 bytes; what we do not count are their headers, 0.002 %."""
    missing = 688_586_727_753 - checkpoint_bytes(V3, "fp8")
    assert 0 < missing / 688_586_727_753 < 3e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_built_model(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        model = Transformer(config)
    sizes = {key: tensor.numel() for key, tensor in model.state_dict().items()}
    plan = plan_model(config)
    in_mtp = sum(size for key, size in sizes.items() if key.startswith("mtp."))
    assert plan.total == sum(sizes.values()) - in_mtp
    assert sum(plan.mtp_modules) == in_mtp
    assert plan.total_with_mtp == sum(sizes.values())

    def in_main(part: str) -> int:
        return sum(size for key, size in sizes.items() if part in key and not key.startswith("mtp."))

    names = {"attention": ".self_attn.", "router": ".mlp.router.", "routed experts": ".mlp.experts.", "head": "lm_head"}
    names |= {"shared experts": ".shared_experts.", "embedding": "embed_tokens"}
    for part, key in names.items():
        assert (plan.parameters[part].total if part in plan.parameters else 0) == in_main(key), part


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_flops_are_those_that_run(
    name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The reference attention multiplies all pairs, which the counter sees; the fused kernel hides its products.
    monkeypatch.setattr(dsv3.ops.attention, "attention", reference_attention)
    monkeypatch.setattr(dsv3.model.experts, "row_alignment", lambda *_: 1)  # padding is no work of the model's
    # A latent so small that absorbing pays in training is not counted: no model of the family has one.
    config = VARIANTS[name].replace(num_nextn_predict_layers=0, kv_lora_rank=BASE.kv_lora_rank + 8)
    model = random_model(config, generator)
    tokens = random_tokens(config, (2, 24), generator)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    plan = plan_model(config, context=24)
    assert counter.get_total_flops() == tokens.numel() * plan.flops.forward_full_attention


def test_causal_attention_counts_the_lower_triangle_and_its_diagonal() -> None:
    context = 7
    keys = sum(query + 1 for query in range(context)) / context
    forward = plan_model(BASE, context=context).flops
    assert forward.parts["attention over keys"] == BASE.num_hidden_layers * attention_flops(BASE, keys)
    full_minus_causal = forward.forward_full_attention - forward.forward
    assert full_minus_causal == BASE.num_hidden_layers * attention_flops(BASE, context - keys)
    # Per head and key: one product of width d_h + d_h^R for the score, one of width d_v for the sum.
    assert attention_flops(V3, 1) == 2 * 128 * (192 + 128)
    assert attention_flops(V3, 1, absorbed=True) == 2 * 128 * (576 + 512)


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_add_up_and_results_are_json(name: str) -> None:
    plan = plan_model(CONFIGS[name], context=512)
    assert sum(count.total for count in plan.parameters.values()) == plan.total
    assert sum(plan.flops.parts.values()) == plan.flops.forward
    assert plan.flops.training == 3 * plan.flops.forward
    assert json.loads(json.dumps(plan.to_dict()))["total"] == plan.total
    console = Console(file=io.StringIO(), width=120)
    console.print(render(plan))
    assert f"{plan.total:,}" in console.file.getvalue()


@given(
    experts=st.sampled_from([4, 8, 16, 64]),
    chosen=st.integers(1, 4),
    shared=st.integers(0, 3),
    width=st.integers(1, 200),
    hidden=st.integers(1, 300),
)
def test_each_expert_costs_what_an_expert_costs(
    experts: int, chosen: int, shared: int, width: int, hidden: int
) -> None:
    config = BASE.replace(
        n_routed_experts=experts,
        n_group=2,
        topk_group=2,
        num_experts_per_tok=chosen,
        n_shared_experts=shared,
        moe_intermediate_size=width,
        hidden_size=hidden,
        num_nextn_predict_layers=0,
    )
    plan, doubled = plan_model(config), plan_model(config.replace(n_routed_experts=2 * experts))
    one, layers = 3 * hidden * width, plan.moe_layers
    assert doubled.total - plan.total == layers * experts * (one + hidden + 1)  # with its gate row and bias
    assert doubled.activated - plan.activated == layers * experts * (hidden + 1)
    more = plan_model(config.replace(n_shared_experts=shared + 1))
    assert more.total - plan.total == more.activated - plan.activated == layers * one
    # FP8: a byte each and four per block of 128 x 128; the gate stays two bytes, its bias four.
    blocks = -(-width // 128) * -(-hidden // 128)
    difference = checkpoint_bytes(config.replace(n_routed_experts=2 * experts), "fp8") - checkpoint_bytes(config, "fp8")
    assert difference == layers * experts * (one + 12 * blocks + 2 * hidden + 4)


def test_bad_input_is_refused() -> None:
    with pytest.raises(UserError, match="context is 0 tokens"):
        plan_model(V3, context=0)
    with pytest.raises(UserError, match="'fp8' or 'bf16'"):
        checkpoint_bytes(V3, "int4")
