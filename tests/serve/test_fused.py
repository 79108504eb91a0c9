"""A block in one native call gives what the block gives, and only what that call takes goes to it."""

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
from dsv3.serve.pack import pack_weights
from dsv3.serve.paged_cache import Chunk, PagedCache, PagedPass
from tests.variants import VARIANTS, random_model

pytestmark = pytest.mark.skipif(
    native.library() is None or not can_pack(torch.empty(0, dtype=torch.bfloat16)),
    reason="needs a compiler, BF16 matrix units and oneDNN",
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


def variant(name):
    config = VARIANTS[name].replace(**SIZES)
    return config if config.q_lora_rank is None else config.replace(q_lora_rank=64)


@pytest.fixture
def calls(monkeypatch):
    """How often a block went to the kernels."""
    counted = []
    described = PagedPass.described
    monkeypatch.setattr(PagedPass, "described", lambda self, *args: counted.append(self) or described(self, *args))
    return counted


def pool(config):
    return PagedCache(config, num_blocks=16, block_size=4, dtype=torch.bfloat16)


def context_of(config, cache, layer, *chunks):
    passed = PagedPass(cache, chunks)
    return make_context(config, passed.positions(layer, 0), torch.device("cpu"), cache=passed)


PASSES = {
    "one token": [Chunk([3, 7, 1], 9, 1)],
    "eight tokens of one": [Chunk([3, 7, 1, 0, 9], 9, 8)],
    "seven sequences, one with two tokens": [
        *(Chunk([4 + i], i % 2, 1) for i in range(5)),
        Chunk([3, 7, 1], 9, 1),
        Chunk([2, 11], 5, 2),
    ],
}


@pytest.mark.parametrize("passed", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("name", VARIANTS)
def test_each_block_is_the_block(name, quantization, passed, calls, generator):
    """Behind contexts of other tokens: hidden states, latents, routing."""
    config = variant(name)
    model = random_model(config, generator, torch.bfloat16)
    pack_weights(model, quantization)
    blocks = [module for module in model.modules() if isinstance(module, FusedBlock)]
    assert len(blocks) == config.num_layers_with_mtp
    n = sum(chunk.num_tokens for chunk in passed)
    for fused in blocks:
        layer = fused.block.self_attn.layer
        h = torch.randn(1, n, config.hidden_size, generator=generator).bfloat16()
        before = torch.randn(pool(config)._data.shape, generator=generator).bfloat16()
        outs, caches, routings = [], [], []
        for block in (fused.block, fused):
            cache = pool(config)
            cache._data.copy_(before)
            with torch.inference_mode():
                out, routing = block(h, context_of(config, cache, layer, *passed))
            outs.append(out)
            caches.append(cache._data)
            routings.append(routing)
        scale = outs[0].abs().max().item()
        torch.testing.assert_close(outs[1].float(), outs[0].float(), atol=0.03 * scale, rtol=0.03)
        torch.testing.assert_close(caches[1].float(), caches[0].float(), atol=0.02, rtol=0.02)
        assert (caches[1] != before).any(-1).sum() == n
        if routings[0] is None:
            assert routings[1] is None
            continue
        torch.testing.assert_close(routings[1].scores_TE, routings[0].scores_TE, atol=0.01, rtol=0.02)
        assert torch.equal(routings[1].expert_ids_TK, routings[0].expert_ids_TK)
        torch.testing.assert_close(routings[1].weights_TK, routings[0].weights_TK, atol=0.01, rtol=0.02)
        assert torch.equal(routings[1].counts_E, routings[0].counts_E)
    assert len(calls) == len(blocks)


def test_routing_is_fp32_whatever_torch_makes_by_default(generator):
    config = variant("v3")
    model = random_model(config, generator, torch.bfloat16)
    pack_weights(model)
    block = next(module for module in model.modules() if isinstance(module, FusedBlock) and module._num_experts)
    h = torch.randn(1, 3, 64, generator=generator).bfloat16()
    with torch.inference_mode():
        context = context_of(config, pool(config), 0, Chunk([1], 0, 3))
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
    h = torch.randn(2, 33, 64, generator=generator).bfloat16()

    def run(h_BSD, cache):
        positions = torch.arange(h_BSD.shape[1]).unsqueeze(0)
        return block(h_BSD, make_context(config, positions, h.device, cache=cache))[0]

    def paged(num_tokens):
        return PagedPass(pool(config), [Chunk([1, 2, 5, 0, 3, 7, 4, 6, 8], 0, num_tokens)])

    def latents(num_rows):
        return LatentCache(config, num_rows, 33, dtype=torch.bfloat16)

    with torch.inference_mode():
        for part, cache in ((h, latents(2)), (h[:1, :3], latents(1)), (h[:1], paged(33)), (h[:1, :3], None)):
            expected = plain(part, make_context(config, torch.arange(part.shape[1])[None], h.device))[0]
            torch.testing.assert_close(run(part, cache).float(), expected.float(), atol=0.05, rtol=0.05)
    with torch.no_grad():
        run(h[:1, :3], paged(3))
    assert not calls
    with torch.inference_mode():
        run(h[:1, :3], paged(3))
    assert len(calls) == 1


def run_first_block(model, config, num_tokens, generator, of_pass=3):
    """Its answer to random rows, over a pass of so many tokens."""
    h = torch.randn(1, num_tokens, 64, generator=generator).bfloat16()
    with torch.inference_mode():
        return model.layers[0](h, context_of(config, pool(config), 0, Chunk([1], 0, of_pass)))[0]


def test_rows_that_are_not_the_pass_are_refused(generator):
    """The kernel would read behind them; the block says so."""
    config = variant("v3")
    model = random_model(config, generator, torch.bfloat16)
    pack_weights(model)
    run_first_block(model, config, 3, generator)
    with pytest.raises((RuntimeError, IndexError)):
        run_first_block(model, config, 2, generator)


def test_a_block_keeps_what_it_has_the_addresses_of(seed):
    """A module that is moved lets its tensors go, and others take their memory."""
    config = variant("v3")
    model = random_model(config, torch.Generator().manual_seed(seed), torch.bfloat16)
    pack_weights(model)
    before = run_first_block(model, config, 3, torch.Generator().manual_seed(seed))
    model.float().bfloat16()
    taken = [torch.full((size,), float("nan"), dtype=torch.bfloat16) for size in (16, 24, 64, 512) for _ in range(99)]
    assert torch.equal(run_first_block(model, config, 3, torch.Generator().manual_seed(seed)), before)
    del taken


@pytest.mark.parametrize("changes", [{"hidden_size": 40}, {"kv_lora_rank": 48}, {"moe_intermediate_size": 24}])
def test_other_sizes_are_left_alone(changes, generator):
    model = random_model(variant("v3").replace(**changes), generator, torch.bfloat16)
    pack_weights(model)
    assert not isinstance(model.layers[-1], FusedBlock)
