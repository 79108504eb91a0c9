"""Attention: the definition against loops, the fused and the absorbed path against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from dsv3.ops.attention import absorbed_attention, attention, causal_mask, reference_attention
from dsv3.ops.latents import Latents

SIZES = [(1, 1), (1, 7), (3, 7), (7, 7)]  # S queries, T keys
each_size = pytest.mark.parametrize(("S", "T"), SIZES)
each_width = pytest.mark.parametrize("V", [4, 6, 9])  # narrower than, as wide as and wider than the key
SCALE = 0.7  # not 1/sqrt(6): a scale that is forgotten shows


def random_qkv(S, T, V, generator, dtype=torch.float64):
    shapes = [(2, 3, S, 6), (2, 3, T, 6), (2, 3, T, V)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def random_mask(S, T, generator):
    """Any pattern in which no query is blind, another for each row of the batch."""
    mask = torch.rand(2, 1, S, T, generator=generator) < 0.5
    return mask | torch.eye(T, dtype=torch.bool)[T - S :]


@each_size
def test_causal_mask(S, T):
    mask = causal_mask(S, T, torch.device("cpu"))
    assert mask.tolist() == [[j <= T - S + i for j in range(T)] for i in range(S)]


@each_size
@pytest.mark.parametrize("masked", [False, True])
def test_the_definition_in_loops(S, T, masked, generator):
    q, k, v = (x.detach() for x in random_qkv(S, T, 4, generator))
    mask = random_mask(S, T, generator) if masked else None
    out = reference_attention(q, k, v, SCALE, mask)
    for b in range(2):
        for h in range(3):
            for i in range(S):
                seen = [j for j in range(T) if (mask[b, 0, i, j] if masked else j <= T - S + i)]
                weights = [math.exp(SCALE * float(q[b, h, i] @ k[b, h, j])) for j in seen]
                expected = sum(w / sum(weights) * v[b, h, j] for w, j in zip(weights, seen, strict=True))
                torch.testing.assert_close(out[b, h, i], expected)


@each_size
@each_width
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_fused_is_the_definition(S, T, V, masked, dtype, tolerance, generator):
    inputs = random_qkv(S, T, V, generator, dtype)
    mask = random_mask(S, T, generator) if masked else None
    direction = torch.randn(2, 3, S, V, dtype=torch.float64, generator=generator)
    outputs, gradients = [], []
    for function, tensors in ((attention, inputs), (reference_attention, [x.detach().double() for x in inputs])):
        for x in tensors:
            x.requires_grad_()
        out = function(*tensors, SCALE, mask)
        outputs.append(out.double())
        gradients.append(torch.autograd.grad((out.double() * direction).sum(), tensors))
    assert inputs[0].dtype == dtype and outputs[0].shape == (2, 3, S, V)
    torch.testing.assert_close(outputs[0], outputs[1], atol=tolerance, rtol=tolerance)
    for fused, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(fused.double(), exact, atol=4 * tolerance, rtol=4 * tolerance)


def random_latents(S, T, generator, dtype=torch.float64):
    H, N, R, C, V = 3, 4, 2, 5, 6
    shapes = [(2, S, H, N), (2, S, H, R), (2, T, C + R), (H, N, C), (H, C, V)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def expanded(q_nope, q_rope, latents, w_uk, w_uv, scale, mask):
    """Keys and values made of every latent, then the definition."""
    c, k_rope = latents.split((w_uk.shape[-1], q_rope.shape[-1]), dim=-1)
    k_nope = torch.einsum("btc,hnc->bhtn", c, w_uk)
    k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
    q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
    return reference_attention(q, k, torch.einsum("btc,hcv->bhtv", c, w_uv), scale, mask).transpose(1, 2)


def absorbed(q_nope, q_rope, latents, w_uk_HNC, w_uv_HCV, scale, mask):
    up_HMC = torch.cat((w_uk_HNC, w_uv_HCV.transpose(1, 2)), dim=1)
    return absorbed_attention(q_nope, q_rope, Latents(latents), up_HMC, scale, mask)


@each_size
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_absorbed_is_expanded(S, T, masked, dtype, tolerance, generator):
    inputs = random_latents(S, T, generator, dtype)
    mask = random_mask(S, T, generator) if masked else None
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    out = absorbed(*inputs, SCALE, mask)
    exact = expanded(*exact_inputs, SCALE, mask)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
    direction = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad((out.double() * direction).sum(), inputs),
        torch.autograd.grad((exact * direction).sum(), exact_inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, atol=10 * tolerance, rtol=10 * tolerance)


def test_gradcheck(generator):
    qkv = [x.detach()[:1, :1].clone().requires_grad_() for x in random_qkv(2, 3, 4, generator)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, SCALE, None), qkv)
    assert torch.autograd.gradcheck(lambda *x: absorbed(*x, SCALE, None), random_latents(2, 3, generator))


def test_the_softmax_is_float32_under_bfloat16(generator):
    """1,000 equal keys: their exponentials, added up in BF16, would stop growing at 256."""
    ones = torch.ones(1, 1, 1000, 4, dtype=torch.bfloat16)
    values = torch.arange(1000.0).view(1, 1, 1000, 1).expand(-1, -1, -1, 4).bfloat16()
    mean = values.float().mean().item()
    q = ones[:, :, :1]
    for function in (attention, reference_attention):
        assert function(q, ones, values, 1.0, None).float().mean().item() == pytest.approx(mean, rel=0.01)
    out = absorbed(
        q.transpose(1, 2),
        q.transpose(1, 2),
        torch.cat((values[0], ones[0]), dim=-1),
        torch.zeros_like(ones[0, :, :4]),
        ones[0, :, :4],
        1.0,
        None,
    )
    assert out.float().mean().item() == pytest.approx(4 * mean, rel=0.01)
