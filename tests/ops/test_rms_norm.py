"""RMSNorm's hand-written backward against autograd through the formula, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_memory import MemoryWatch
from dsv3.ops.rms_norm import reference_rms_norm, rms_norm


@pytest.mark.parametrize("shape", [(5,), (7, 3), (2, 3, 8), (0, 6), (4, 1)])
def test_values_and_gradients_are_the_references(shape, generator):
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    x, weight, direction = draw(*shape), draw(shape[-1]), draw(*shape)
    out = []
    for function in (rms_norm, reference_rms_norm):
        y = function(x, weight, 1e-3)
        out.append((y, *torch.autograd.grad((y * direction).sum(), (x, weight))))
    for got, want in zip(*out, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gradients_against_differences(generator):
    x = torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-2), (x, weight))


def test_bfloat16_computes_in_float32_and_rounds_once(generator):
    x = (30 * torch.randn(64, 96, generator=generator)).bfloat16().requires_grad_()
    weight = torch.randn(96, generator=generator).bfloat16().requires_grad_()
    direction = torch.randn(64, 96, generator=generator).bfloat16()
    y = rms_norm(x, weight, 1e-6)
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = reference_rms_norm(wide_x, wide_weight, 1e-6)
    (y * direction).sum().backward()
    (exact * direction.double()).sum().backward()
    # Half a unit in the last place of BF16, with a little room for FP32's own rounding.
    for got, want in ((y, exact), (weight.grad, wide_weight.grad), (x.grad, wide_x.grad)):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_its_input_and_one_number_per_row(dtype, generator):
    x = torch.randn(40, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.ones(32, dtype=dtype, requires_grad=True)
    with MemoryWatch() as watch:
        y = rms_norm(x, weight, 1e-6)
        assert watch.alive == 40 * 32 * dtype.itemsize + 40 * 4
    assert y.requires_grad
