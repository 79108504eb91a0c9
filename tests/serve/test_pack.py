"""Packed weights give what the weights they were made of give."""

from __future__ import annotations

import copy

import pytest
import torch

from dsv3.errors import UserError
from dsv3.model.cache import LatentCache
from dsv3.model.mla import LatentUpProjection
from dsv3.model.router import Router
from dsv3.ops import native
from dsv3.ops.experts import reference_grouped_swiglu
from dsv3.ops.native import bf16_weight
from dsv3.ops.packed import PackedWeight, can_pack, packed_grouped_swiglu
from dsv3.ops.quantized import Int4Weight, Int8DynamicWeight, Int8Weight
from dsv3.serve.pack import PackedLinear, pack_weights
from tests.variants import BASE, VARIANTS, random_model, random_tokens

needs_packing = pytest.mark.skipif(
    not can_pack(torch.empty(0, dtype=torch.bfloat16)), reason="needs a CPU with BF16 matrix units and oneDNN"
)


@needs_packing
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_packed_linear_map(rows, generator):
    weight = torch.randn(24, 16, generator=generator).bfloat16()
    x = torch.randn(2, rows, 16, generator=generator).bfloat16()
    out = PackedWeight(weight).linear(x)
    assert out.shape == (2, rows, 24) and out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T, atol=0.02, rtol=0.01)


@needs_packing
@pytest.mark.parametrize("counts", [[3, 0, 1, 4], [0, 0, 0, 1], [0, 0, 0, 0]])
def test_packed_experts(counts, generator):
    N, D, F = sum(counts), 16, 8
    x, gate_up, down = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((N, D), (4, 2 * F, D), (4, D, F))
    )
    weights = torch.rand(N, generator=generator)
    out = packed_grouped_swiglu(
        x, weights, torch.tensor(counts), [PackedWeight(w) for w in gate_up], [PackedWeight(w) for w in down]
    )
    exact = reference_grouped_swiglu(
        x.double(), weights.double(), torch.tensor(counts), gate_up.double(), down.double()
    )
    assert out.shape == (N, D) and out.dtype == torch.bfloat16
    if N:
        torch.testing.assert_close(out.double(), exact, atol=0.02 * exact.abs().max().item(), rtol=0.02)


@needs_packing
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_packed_model_speaks_like_the_model(name, generator):
    """Prompt (expanded) and decoding (absorbed), main model and MTP.

    No parameter of a linear map is left but those of experts that our own kernel takes.
    """
    config = VARIANTS[name]
    model = random_model(config, generator, torch.bfloat16)
    packed = copy.deepcopy(model)
    assert pack_weights(packed)
    left = {key for key, _ in packed.named_parameters() if "norm" not in key}
    kept = ("embed_tokens.weight", "router.weight")
    experts = model.layers[-1].mlp.experts
    if native.takes_experts(bf16_weight(experts.gate_up_proj), bf16_weight(experts.down_proj)):
        kept += ("experts.gate_up_proj", "experts.down_proj")
    assert {key for key in left if not key.endswith(kept)} == set()
    tokens = random_tokens(config, (2, 12), generator)
    outs = []
    for each in (model, packed):
        cache = LatentCache(config, 2, 12, dtype=each.dtype, device=each.device)
        hidden = [each.extend(part, cache) for part in tokens.split([10, 1, 1], dim=1)]
        outs.append((each.lm_head(torch.cat(hidden, dim=1)), *each(tokens).mtp_logits))
    for expected, got in zip(*outs, strict=True):
        close = (got - expected).abs().float() <= 0.05 * expected.abs().max()
        assert close.float().mean() > 0.97  # a rounding may send a token to another expert


QUANTIZED = {
    quantization: pytest.param(
        quantization, head, other, marks=pytest.mark.skipif(not kind.available(), reason=f"no kernel for {kind}")
    )
    for quantization, head, other, kind in (
        ("int8", Int8Weight, Int8Weight, Int8Weight),
        ("int4", Int8Weight, Int4Weight, Int4Weight),
        ("int8-dynamic", Int8DynamicWeight, Int8DynamicWeight, Int8DynamicWeight),
    )
}


@needs_packing
@pytest.mark.parametrize(("quantization", "head", "other"), QUANTIZED.values(), ids=QUANTIZED)
@torch.no_grad()
def test_a_quantised_model_speaks_about_like_the_model(quantization, head, other, generator):
    """Prompt and decoding; each map is of the kind that was asked for, what is never quantised is not."""
    config = BASE.replace(hidden_size=64, moe_intermediate_size=64, v_head_dim=32, q_lora_rank=64, intermediate_size=64)
    model = random_model(config, generator, torch.bfloat16)
    quantized = copy.deepcopy(model)
    assert pack_weights(quantized, quantization)
    kinds = {
        name: type(module._weight) for name, module in quantized.named_modules() if isinstance(module, PackedLinear)
    }
    up = {name for name, module in model.named_modules() if isinstance(module, LatentUpProjection)}
    assert {name for name, kind in kinds.items() if kind is PackedWeight} == up and kinds["lm_head"] is head
    assert {kind for name, kind in kinds.items() if name not in up | {"lm_head"}} == {other}
    for name, module in model.named_modules():
        if isinstance(module, Router):
            assert torch.equal(quantized.get_submodule(name).weight, module.weight)
    experts = quantized.layers[-1].mlp.experts
    assert {type(weight) for weight in experts._gate_up + experts._down} == {other}
    tokens = random_tokens(config, (1, 24), generator)
    outs = []
    for each in (model, quantized):
        cache = LatentCache(config, 1, 24, dtype=each.dtype, device=each.device)
        hidden = [each.extend(part, cache) for part in tokens.split([20, *[1] * 4], dim=1)]
        outs.append(each.lm_head(torch.cat(hidden, dim=1)).float())
    off = (outs[1] - outs[0]).norm() / outs[0].norm()
    assert 0 < off < (0.5 if quantization == "int4" else 0.25)  # a rounding may send a token to another expert


@needs_packing
@pytest.mark.skipif(not Int4Weight.available(), reason="no kernel for int4")
def test_a_map_that_does_not_fit_the_kernel_is_packed_only(generator):
    model = random_model(BASE.replace(hidden_size=64, q_lora_rank=24, v_head_dim=32), generator, torch.bfloat16)
    pack_weights(model, "int4")
    attention = model.layers[0].self_attn
    assert type(attention.q_b_proj._weight) is PackedWeight
    assert type(attention.q_a_proj._weight) is type(attention.o_proj._weight) is Int4Weight


def test_what_cannot_be_quantised_is_refused(generator):
    model = random_model(VARIANTS["v3"], generator, torch.float32)
    with pytest.raises(UserError, match="int8 weights need a model in bfloat16 on a CPU, this one is in float32"):
        pack_weights(model, "int8")
    with pytest.raises(UserError, match="'int3', expected none, int8, int4, int8-dynamic"):
        pack_weights(model, "int3")
    assert all(type(module) is not PackedLinear for module in model.modules())


def test_what_cannot_be_packed_stays(generator):
    model = random_model(VARIANTS["v3"], generator, torch.float32)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert not pack_weights(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
