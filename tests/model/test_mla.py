"""Latent attention: both orders of its products against the reference in loops, with and without the cache."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_memory import MemoryWatch
from dsv3.config import ModelConfig
from dsv3.model import mla
from dsv3.model.cache import LatentCache, Piece
from dsv3.model.context import Context
from dsv3.model.mla import MultiHeadLatentAttention, absorbing_pays
from dsv3.model.rope import cos_sin, inverse_frequencies
from dsv3.ops.latents import Latents
from tests import reference
from tests.variants import VARIANTS, random_model

NAMES = [
    "v3",
    "no query latent, 2 shared experts, D=2",
    "yarn, no shared experts, D=3",
    "greedy, small latent, wide values",
]
each_shape = pytest.mark.parametrize("config", [VARIANTS[name] for name in NAMES], ids=NAMES)
each_order = pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])


def random_attention(config: ModelConfig, generator: torch.Generator, dtype: torch.dtype) -> MultiHeadLatentAttention:
    return random_model(config, generator, dtype).layers[1].self_attn


def context(config: ModelConfig, start: int, end: int, cache: LatentCache | None = None) -> Context:
    cos, sin = cos_sin(config, inverse_frequencies(config), torch.arange(start, end).unsqueeze(0))
    return Context(cos=cos, sin=sin, cache=cache)


@each_shape
@each_order
def test_both_orders_are_the_reference(config, absorbed, generator):
    attn = random_attention(config, generator, torch.float64)
    x = torch.randn(2, 7, config.hidden_size, dtype=torch.float64, generator=generator)
    W = reference.weights_of(attn)
    expected = torch.stack([torch.stack(reference.attention(config, W, "", list(rows))) for rows in x])
    torch.testing.assert_close(attn(x, context(config, 0, 7), absorbed), expected, atol=1e-5, rtol=1e-5)


@each_shape
@pytest.mark.parametrize(("start", "S"), [(0, 1), (0, 20), (13, 1), (13, 7)])
def test_absorbed_equals_expanded_in_float32(config, start, S, generator):
    attn = random_attention(config, generator, torch.float32)
    x = torch.randn(3, start + S, config.hidden_size, generator=generator)
    outputs = []
    for absorbed in (False, True):
        cache = LatentCache(config, 3, start + S, dtype=torch.float32)
        with torch.no_grad():
            if start:
                attn(x[:, :start], context(config, 0, start, cache), absorbed)
            outputs.append(attn(x[:, start:], context(config, start, start + S, cache), absorbed))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    assert outputs[0].abs().mean() > 0.01


@each_shape
def test_both_orders_have_one_gradient(config, generator):
    attn = random_attention(config, generator, torch.float64)
    x = torch.randn(2, 6, config.hidden_size, dtype=torch.float64, generator=generator, requires_grad=True)
    direction = torch.randn(2, 6, config.hidden_size, dtype=torch.float64, generator=generator)
    gradients = []
    for absorbed in (False, True):
        loss = (attn(x, context(config, 0, 6), absorbed) * direction).sum()
        gradients.append(torch.autograd.grad(loss, [x, *attn.parameters()]))
    for expanded, absorbed in zip(*gradients, strict=True):
        assert expanded.abs().max() > 0
        torch.testing.assert_close(absorbed, expanded, atol=1e-10, rtol=1e-8)


@each_shape
@each_order
def test_the_cache_holds_the_normed_latent_and_the_rotated_key(config, absorbed, generator):
    attn = random_attention(config, generator, torch.float64)
    x = torch.randn(1, 6, config.hidden_size, dtype=torch.float64, generator=generator)
    cache = LatentCache(config, 1, 6, dtype=torch.float64)
    with torch.no_grad():
        attn(x[:, :4], context(config, 0, 4, cache), absorbed)
        attn(x[:, 4:], context(config, 4, 6, cache), absorbed)
        W = reference.weights_of(attn)
    held = cache.append(attn.layer, torch.empty(1, 0, config.latent_dim, dtype=torch.float64))[0].latents.side_by_side()
    for j in range(6):
        expected = torch.cat(reference.latents(config, W, "", x[0, j], j))
        torch.testing.assert_close(held[0, j], expected, atol=1e-5, rtol=1e-5)


@each_order
def test_poisoned_slots_behind_the_length_are_never_read(absorbed, generator):
    config = VARIANTS["v3"]
    attn = random_attention(config, generator, torch.float32)
    x = torch.randn(2, 5, config.hidden_size, generator=generator)
    outputs = []
    for room in (5, 50):  # the slots behind the fifth are NaN
        cache = LatentCache(config, 2, room, dtype=torch.float32)
        with torch.no_grad():
            outputs.append(attn(x, context(config, 0, 5, cache), absorbed))
    assert outputs[1].isfinite().all()
    torch.testing.assert_close(outputs[1], outputs[0])


@each_order
def test_a_mask_hides_keys(absorbed, generator):
    config = VARIANTS["v3"]
    attn = random_attention(config, generator, torch.float64)
    x = torch.randn(1, 6, config.hidden_size, dtype=torch.float64, generator=generator)
    plain = context(config, 0, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[4:, 1] = False  # queries 4 and 5 no longer see key 1
    masked = Context(cos=plain.cos, sin=plain.sin, mask=mask[None, None])
    out = attn(x, masked, absorbed)
    torch.testing.assert_close(out[:, :4], attn(x, plain, absorbed)[:, :4])
    other = x.clone()
    other[:, 1] += 1
    changed = (attn(other, masked, absorbed) - out).abs().amax(-1)[0] > 1e-9
    assert changed.tolist() == [False, True, True, True, False, False]


def test_prompts_run_expanded_and_decoding_absorbed():
    v3 = ModelConfig.preset("v3-671b")
    assert not any(absorbing_pays(v3, S, S) for S in (2, 100, 4096))
    assert all(absorbing_pays(v3, S, T) for S in (1, 2, 4) for T in (100, 4096, 163840))


@each_shape
@each_order
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tokens", [1, 3, 8, 40])
def test_a_long_context_in_parts_is_the_whole(config, absorbed, dtype, tokens, generator, monkeypatch):
    """`tokens` of the context, or of the scores of as many keys, at a time."""
    attn = random_attention(config, generator, dtype)
    x = torch.randn(2, 61, config.hidden_size, dtype=dtype, generator=generator)
    width = config.qk_head_dim + config.v_head_dim if not absorbed else 61
    outputs = []
    for values in (2**23, 2 * config.num_attention_heads * width * tokens):
        monkeypatch.setattr(mla, "values_at_a_time", lambda _, values=values: values)
        cache = LatentCache(config, 2, 61, dtype=dtype)
        with torch.no_grad():
            parts = [attn(x[:, a:b], context(config, a, b, cache), absorbed) for a, b in ((0, 7), (7, 50), (50, 61))]
        outputs.append(torch.cat(parts, dim=1))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(outputs[1], outputs[0], atol=tolerance, rtol=tolerance)


@each_order
def test_a_masked_piece_in_parts_is_the_whole(absorbed, generator, monkeypatch):
    """Sequences of different lengths, padded: parts that lie wholly behind one of them weigh nothing."""
    config = VARIANTS["v3"]
    attn = random_attention(config, generator, torch.float64)
    H, N, R = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    nope, rope = (torch.randn(1, 6, H, width, dtype=torch.float64, generator=generator) for width in (N, R))
    latents = torch.randn(2, 30, config.latent_dim, dtype=torch.float64, generator=generator)
    ends = torch.tensor([[7, 8, 9], [27, 28, 29]])
    mask = (torch.arange(30) <= ends.unsqueeze(2)).unsqueeze(1)
    outputs = []
    for values in (2**23, 4 * 2 * H * (config.qk_head_dim + config.v_head_dim)):
        monkeypatch.setattr(mla, "values_at_a_time", lambda _, values=values: values)
        outputs.append(attn.attend_to_pieces(nope, rope, [Piece(Latents(latents), 3, mask)], absorbed))
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-12, rtol=1e-12)


@each_order
def test_memory_of_a_chunk_does_not_grow_with_its_context(absorbed, generator, monkeypatch):
    config = VARIANTS["v3"].replace(max_position_embeddings=4096)
    attn = random_attention(config, generator, torch.float32)
    monkeypatch.setattr(mla, "values_at_a_time", lambda _: 2**14)
    S, peaks = 16, []
    for T in (1024, 4096):
        cache = LatentCache(config, 1, T, dtype=torch.float32)
        with torch.no_grad():
            for start in range(0, T - S, 240):
                end = min(start + 240, T - S)
                hidden = torch.randn(1, end - start, config.hidden_size, generator=generator)
                attn(hidden, context(config, start, end, cache), absorbed=False)
            hidden = torch.randn(1, S, config.hidden_size, generator=generator)
            last = context(config, T - S, T, cache)
            with MemoryWatch() as watch:
                attn(hidden, last, absorbed)
        peaks.append(watch.peak)
    assert peaks[1] < 1.1 * peaks[0]
    whole = 4096 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * 4
    assert peaks[1] < whole / 2
