"""Batch invariance: bit for bit the same numbers, whatever the batch, the chunks, the cache and the drafts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dsv3.config import ModelConfig
from dsv3.model import mla
from dsv3.model.transformer import Transformer
from dsv3.ops.packed import PackedWeight, can_pack
from dsv3.ops.quantized import Int4Weight, Int8DynamicWeight, Int8Weight
from dsv3.serve.engine import Engine
from dsv3.serve.engine_config import EngineConfig
from dsv3.serve.generate import generate
from dsv3.serve.invariant import TILE, FixedShapes, KernelPass, pass_kind
from dsv3.serve.pack import pack_weights
from dsv3.serve.params import SamplingParams
from tests.variants import BASE, random_model, random_tokens

INVARIANT = EngineConfig(block_size=4, batch_invariant=True, debug=True)
WAYS: list[dict[str, object]] = [
    {"max_prefill_tokens": 7},
    {"cache_tokens": 168, "max_prefill_tokens": 23},
    {"prefix_caching": False, "draft_tokens": 0, "block_size": 5},
]


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["FP32", "BF16"])
@pytest.mark.parametrize("shape", [(16, 24), (256, 512), (500, 36), (1408, 512)])
def test_a_rows_product_depends_on_the_row_alone(dtype, shape, threads, generator):
    weight = torch.randn(shape[1], shape[0], generator=generator).to(dtype)
    x = torch.randn(5 * TILE + 3, shape[0], generator=generator).to(dtype)
    with FixedShapes():
        whole = F.linear(x, weight)
        order = torch.randperm(len(x), generator=generator)
        assert torch.equal(F.linear(x[order], weight), whole[order])
        for start, end in ((0, 1), (2, 5), (7, 7 + TILE), (11, 60)):
            assert torch.equal(F.linear(x[None, start:end], weight)[0], whole[start:end])
            out = torch.empty(end - start, shape[1], dtype=dtype)
            assert torch.mm(x[start:end], weight.T, out=out) is out and torch.equal(out, whole[start:end])
    torch.testing.assert_close(whole, F.linear(x, weight))
    if can_pack(weight):
        packed = PackedWeight(weight)
        with FixedShapes():
            whole = packed.linear(x)
            assert torch.equal(packed.linear(x[order]), whole[order])
            assert torch.equal(packed.linear(x[None, 2:5])[0], whole[2:5])
        torch.testing.assert_close(whole, packed.linear(x))
    for kind in (Int8Weight, Int4Weight, Int8DynamicWeight):
        if can_pack(weight) and kind.available() and kind.fits(*weight.shape):
            quantized = kind(kind.quantize(weight))
            with FixedShapes():
                whole = quantized.linear(x)
                assert torch.equal(quantized.linear(x[order]), whole[order])
                assert torch.equal(quantized.linear(x[None, 2:5])[0], whole[2:5])


CONFIGS = {
    "tiny": BASE.replace(max_position_embeddings=160, num_nextn_predict_layers=2),
    "micro": ModelConfig.preset("micro").replace(vocab_size=48),
}
FUSED = BASE.replace(  # our own kernels take all of it
    hidden_size=64,
    moe_intermediate_size=64,
    intermediate_size=128,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_rope_head_dim=16,
    v_head_dim=32,
    max_position_embeddings=160,
)
CASES = [
    ("tiny", torch.float32, 1),
    ("micro", torch.bfloat16, 1),
    pytest.param("tiny", torch.bfloat16, 2, marks=pytest.mark.slow),
]
KINDS = {"int8": Int8Weight, "int4": Int4Weight, "int8-dynamic": Int8DynamicWeight}


def close_calls(config: ModelConfig, generator: torch.Generator, dtype: torch.dtype) -> Transformer:
    """A model whose likeliest tokens are nearly equal: a last bit would change many a token."""
    model = random_model(config, generator, dtype)
    with torch.no_grad():
        model.lm_head.weight *= 0.25
    return model


@pytest.mark.parametrize(("name", "dtype", "threads"), CASES, indirect=["threads"])
def test_texts_and_logits_are_bitwise_those_of_the_request_alone(name, dtype, threads, generator):
    model = close_calls(CONFIGS[name], generator, dtype)
    if dtype == torch.bfloat16:
        pack_weights(model)
    check_invariance(model, generator)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_so_they_are_through_our_own_kernels(quantization, threads, generator):
    """However many tokens a pass has. (`pass_kind` chooses it where all blocks are taken.)"""
    model = close_calls(FUSED, generator, torch.bfloat16)
    pack_weights(model, quantization if can_pack(model.lm_head.weight) else "none")
    if pass_kind(model) is not KernelPass:
        pytest.skip("our own kernels are not here")
    check_invariance(model, generator)


@pytest.mark.parametrize("quantization", KINDS)
def test_so_they_are_with_quantised_weights(quantization, generator):
    """Their kernels are chosen by the number of rows."""
    model = close_calls(CONFIGS["micro"], generator, torch.bfloat16)
    if not (can_pack(model.lm_head.weight) and KINDS[quantization].available()):
        pytest.skip(f"no kernel for {quantization}")
    pack_weights(model, quantization)
    check_invariance(model, generator)


def test_so_they_are_when_keys_are_made_of_a_long_context_part_by_part(generator, monkeypatch):
    """No model that pays its way decodes expanded; if one did, its parts would begin at the same positions anywhere."""
    monkeypatch.setattr(mla, "absorbing_pays", lambda *_: False)
    monkeypatch.setattr(mla, "values_at_a_time", lambda _: 16 * 2 * (24 + 16) * 23)  # 23 tokens
    check_invariance(close_calls(CONFIGS["tiny"], generator, torch.float32), generator)


def check_invariance(model: Transformer, generator: torch.Generator) -> None:
    """Every request alone, then all together in every way, twice."""
    config = model.config
    stem = random_tokens(config, (100,), generator).tolist()
    prompts = [stem[:1], stem[:33], stem[:66], stem[:66], stem[40:52], stem[:30], stem[3:20]]
    params = [
        SamplingParams(max_tokens=6, logprobs=3, ignore_eos=True, **settings)
        for settings in ({}, {}, {"temperature": 1.0, "seed": 1}, {}, {"temperature": 0.8, "seed": 2, "top_p": 0.9})
    ]
    params += [SamplingParams(max_tokens=6, temperature=1.0, top_k=20, seed=5, logprobs=3), params[0]]
    alone = []
    for prompt, of_prompt in zip(prompts, params, strict=True):
        engine = Engine(model, None, dataclasses.replace(INVARIANT, draft_tokens=0))
        alone.append(numbers(engine.generate([prompt], of_prompt)[0][0]))
    for settings in WAYS:
        engine = Engine(model, None, dataclasses.replace(INVARIANT, **settings))
        for _ in range(2):
            together = [numbers(completion) for (completion,) in engine.generate(prompts, params)]
            assert together == alone


def numbers(completion) -> list[tuple]:
    return [(token.id, token.logprob, token.top_logprobs) for token in completion.tokens]


def test_the_text_is_that_of_plain_generation(generator):
    config = CONFIGS["tiny"]
    model = random_model(config, generator)
    prompts = random_tokens(config, (3, 70), generator).tolist()
    engine = Engine(model, None, INVARIANT)
    completions = engine.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        assert completion.token_ids == generate(model, prompt, max_new_tokens=12).tolist()[70:]
    assert sum(engine.metrics.expert_load["layers.1"]) % config.num_experts_per_tok == 0
