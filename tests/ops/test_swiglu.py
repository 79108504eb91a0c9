"""SwiGLU and its hand-written backward."""

from __future__ import annotations

import pytest
import torch

from dsv3 import compat
from dsv3.ops.swiglu import swiglu, swiglu_backward


def formula(h: torch.Tensor) -> torch.Tensor:
    width = h.shape[-1] // 2
    gate, up = h[..., :width], h[..., width:]
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("shape", [(6,), (5, 8), (2, 3, 10), (0, 4)])
def test_value_and_gradient_are_the_formulas(shape, generator):
    h = (3 * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()
    torch.testing.assert_close(swiglu(h), formula(h))
    direction = torch.randn(swiglu(h).shape, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad((function(h) * direction).sum(), h)[0] for function in (swiglu, formula)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("private_op", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_backward_without_a_graph(private_op, dtype, tolerance, generator, monkeypatch):
    if not private_op:

        class Torch:
            """A torch release without the private operator."""

            ops = type("Ops", (), {"aten": object()})

            def __getattr__(self, name):
                return getattr(torch, name)

        monkeypatch.setattr(compat, "torch", Torch())
    h = (3 * torch.randn(7, 16, dtype=torch.float64, generator=generator)).to(dtype)
    grad = torch.randn(7, 8, dtype=torch.float64, generator=generator).to(dtype)
    exact = h.double().clone().requires_grad_()
    formula(exact).backward(grad.double())
    out = swiglu_backward(h, grad)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact.grad, atol=tolerance, rtol=tolerance)
