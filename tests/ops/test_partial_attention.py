"""Attention to a part of the keys, and parts merged, against attention to all of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from dsv3.ops import blocked_attention as blocks
from dsv3.ops.attention import reference_attention
from dsv3.ops.partial_attention import Partial, merge, partial_attention, reference_merge

SCALE = 0.7
each_dtype = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])


def random_qkv(S, T, generator, dtype=torch.float64):
    shapes = [(2, 3, S, 6), (2, 3, T, 6), (2, 3, T, 4)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def merged(partials: list[Partial]) -> Partial:
    whole = partials[0]
    for part in partials[1:]:
        whole = merge(whole, part)
    return whole


@pytest.mark.parametrize("kind", ["all", "causal", "masked"])
def test_a_part_by_its_definition_in_loops(kind, generator):
    S, T = 3, 8
    q, k, v = random_qkv(S, T, generator)
    mask = torch.rand(2, 1, S, T, generator=generator) < 0.5
    mask[1, 0, 2] = False  # a query that sees nothing
    part = partial_attention(q, k, v, SCALE, mask if kind == "masked" else None, causal=kind == "causal")
    for b in range(2):
        for h in range(3):
            for i in range(S):
                last = T - S + i if kind == "causal" else T
                seen = [j for j in range(T) if j <= last and (kind != "masked" or mask[b, 0, i, j])]
                weights = [math.exp(SCALE * float(q[b, h, i] @ k[b, h, j])) for j in seen]
                values = [w / sum(weights) * v[b, h, j] for w, j in zip(weights, seen, strict=True)]
                expected = sum(values, v.new_zeros(4))
                torch.testing.assert_close(part.out_BHSV[b, h, i], expected)
                lse = math.log(sum(weights)) if seen else -math.inf
                assert float(part.lse_BHS[b, h, i]) == pytest.approx(lse, abs=1e-12)


@each_dtype
@pytest.mark.parametrize("size", [1, 2, 5, 16, 37, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_merged_parts_are_the_whole(size, masked, dtype, tolerance, generator, monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCK_SCORES", 1)  # blocks of 32 queries
    S, T = 40, 77
    q, k, v = random_qkv(S, T, generator, dtype)
    q[0, 0] *= 30  # sharp softmaxes: parts differ in weight by more than an exponential can hold
    mask = None
    borders = [*range(0, T - S, size), T - S, T]
    if masked:
        mask = (torch.rand(2, 1, S, T, generator=generator) < 0.3) | torch.eye(T, dtype=torch.bool)[T - S :]
        borders = [*range(0, T, size), T]
    partials = []
    for start, end in pairwise(borders):
        of_part = None if mask is None else mask[..., start:end]
        causal = mask is None and end == T
        partials.append(partial_attention(q, k[:, :, start:end], v[:, :, start:end], SCALE, of_part, causal=causal))
    exact = reference_attention(*(x.double() for x in (q, k, v)), SCALE, mask)
    for whole in (merged(partials), merged(partials[::-1]), reference_merge(partials)):
        assert whole.out_BHSV.dtype == dtype
        torch.testing.assert_close(whole.out_BHSV.double(), exact, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(merged(partials).lse_BHS, reference_merge(partials).lse_BHS)


def test_what_nobody_has_seen_yet_weighs_nothing(generator):
    q, k, v = random_qkv(2, 3, generator)
    nothing = partial_attention(q, k, v, SCALE, torch.zeros(2, 1, 2, 3, dtype=torch.bool))
    assert not nothing.out_BHSV.any() and (nothing.lse_BHS == -math.inf).all()
    something = partial_attention(q, k, v, SCALE)
    for whole in (merge(nothing, something), merge(something, nothing)):
        assert torch.equal(whole.out_BHSV, something.out_BHSV) and torch.equal(whole.lse_BHS, something.lse_BHS)
    both = merge(nothing, nothing)
    assert not both.out_BHSV.any() and (both.lse_BHS == -math.inf).all()


def test_parts_in_bfloat16_are_added_up_in_float32(generator):
    """256 parts of one key each with equal weight: a sum in BF16 would stop growing long before."""
    q = torch.ones(1, 1, 1, 4, dtype=torch.bfloat16)
    values = torch.rand(1, 1, 256, 4, generator=generator).bfloat16()
    partials = [partial_attention(q, q, value, 1.0) for value in values.split(1, dim=2)]
    whole = merged(partials)
    assert whole.out_BHSV.dtype == whole.lse_BHS.dtype == torch.float32
    torch.testing.assert_close(whole.out_BHSV, values.float().mean(2, keepdim=True), atol=1e-5, rtol=1e-5)
