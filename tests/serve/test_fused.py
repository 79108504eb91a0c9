"""A block in three native calls gives what the block gives, and only what these calls take goes to them."""

from __future__ import annotations

import copy

import pytest
import torch

from dsv3.model.block import Block
from dsv3.model.cache import LatentCache
from dsv3.model.context import make_context
from dsv3.ops import native
from dsv3.ops.packed import can_pack
from dsv3.serve.fused import FusedBlock
from dsv3.serve.invariant import FixedShapes
from dsv3.serve.pack import pack_weights
from tests.variants import VARIANTS, random_model

pytestmark = pytest.mark.skipif(
    native.library() is None or not can_pack(torch.empty(0, dtype=torch.bfloat16)),
    reason="needs a compiler, BF16 matrix units and oneDNN",
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}


def variant(name):
    config = VARIANTS[name].replace(**SIZES)
    return config if config.q_lora_rank is None else config.replace(q_lora_rank=32)


@pytest.fixture
def calls(monkeypatch):
    """How often a block went to the kernels."""
    counted = []
    before = FusedBlock._before
    monkeypatch.setattr(FusedBlock, "_before", lambda self, *args: counted.append(self) or before(self, *args))
    return counted


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("name", VARIANTS)
def test_each_block_is_the_block(name, quantization, calls, generator):
    """Behind a context of 9 tokens, 1 to 8 more: hidden states, latents, routing."""
    config = variant(name)
    model = random_model(config, generator, torch.bfloat16)
    pack_weights(model, quantization)
    blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
    assert len(blocks) == config.num_layers_with_mtp
    for tokens in (1, 8):
        for fused in blocks:
            layer = fused.block.self_attn.layer
            h = torch.randn(1, 9 + tokens, 64, generator=generator).bfloat16()
            outs, caches, routings = [], [], []
            for block in (fused.block, fused):
                cache = LatentCache(config, 1, 9 + tokens, dtype=torch.bfloat16)
                with torch.inference_mode():
                    start = make_context(config, cache.positions(layer, 9), h.device, cache=cache)
                    fused.block(h[:, :9], start)
                    context = make_context(config, cache.positions(layer, tokens), h.device, cache=cache)
                    out, routing = block(h[:, 9:], context)
                outs.append(out)
                caches.append(cache._data[layer])
                routings.append(routing)
            scale = outs[0].abs().max().item()
            torch.testing.assert_close(outs[1].float(), outs[0].float(), atol=0.03 * scale, rtol=0.03)
            torch.testing.assert_close(caches[1].float(), caches[0].float(), atol=0.02, rtol=0.02)
            if routings[0] is None:
                assert routings[1] is None
                continue
            torch.testing.assert_close(routings[1].scores_TE, routings[0].scores_TE, atol=0.01, rtol=0.02)
            assert torch.equal(routings[1].expert_ids_TK, routings[0].expert_ids_TK)
            torch.testing.assert_close(routings[1].weights_TK, routings[0].weights_TK, atol=0.01, rtol=0.02)
            assert torch.equal(routings[1].counts_E, routings[0].counts_E)
    assert len(calls) == 2 * len(blocks)


def test_routing_is_fp32_whatever_torch_makes_by_default(generator):
    config = variant("v3")
    model = random_model(config, generator, torch.bfloat16)
    pack_weights(model)
    block = next(module for module in model.modules() if isinstance(module, FusedBlock) and module._num_experts)
    cache = LatentCache(config, 1, 9, dtype=torch.bfloat16)
    h = torch.randn(1, 3, 64, generator=generator).bfloat16()
    with torch.inference_mode():
        context = make_context(config, cache.positions(0, 3), h.device, cache=cache)
        torch.set_default_dtype(torch.bfloat16)
        try:
            _, routing = block(h, context)
        finally:
            torch.set_default_dtype(torch.float32)
    assert routing.scores_TE.dtype == routing.weights_TK.dtype == torch.float32


def test_what_the_calls_do_not_take_goes_to_the_block(calls, generator):
    config = variant("v3")
    model = random_model(config, generator, torch.bfloat16)
    plain = copy.deepcopy(model.layers[0])
    pack_weights(model)
    block = model.layers[0]
    assert isinstance(block, FusedBlock) and isinstance(block.block, Block)
    h = torch.randn(2, 9, 64, generator=generator).bfloat16()

    def run(h_BSD, with_cache=True):
        cache = LatentCache(config, len(h_BSD), 9, dtype=torch.bfloat16) if with_cache else None
        positions = torch.arange(h_BSD.shape[1]).unsqueeze(0)
        return block(h_BSD, make_context(config, positions, h.device, cache=cache))[0]

    with torch.inference_mode():
        for part in (h, h[:, :3], h[:1]):  # two rows; more than eight tokens
            expected = plain(part, make_context(config, torch.arange(part.shape[1])[None], h.device))[0]
            torch.testing.assert_close(run(part).float(), expected.float(), atol=0.05, rtol=0.05)
        run(h[:1, :3], with_cache=False)
        with FixedShapes():
            run(h[:1, :3])
    with torch.no_grad():
        run(h[:1, :3])
    assert not calls
    with torch.inference_mode():
        run(h[:1, :3])
    assert len(calls) == 1


@pytest.mark.parametrize("changes", [{"hidden_size": 48}, {"kv_lora_rank": 40}, {"moe_intermediate_size": 24}])
def test_other_sizes_are_left_alone(changes, generator):
    model = random_model(variant("v3").replace(**changes), generator, torch.bfloat16)
    pack_weights(model)
    assert not isinstance(model.layers[-1], FusedBlock)
