"""RMSNorm against its formula."""

from __future__ import annotations

import pytest
import torch

from dsv3.model.norm import RMSNorm


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_formula(size, generator):
    norm = RMSNorm(24, 1e-6).double()
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
    x = size * torch.randn(3, 5, 24, dtype=torch.float64, generator=generator)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_bfloat16_is_rounded_once_behind_float32(generator):
    norm = RMSNorm(512, 1e-6).bfloat16()
    x = (100 * torch.randn(20, 512, generator=generator)).bfloat16()
    exact = RMSNorm(512, 1e-6)(x.float())
    assert norm(x).dtype == torch.bfloat16
    # Half a unit in the last place: a mean square summed in BF16 would be far off.
    torch.testing.assert_close(norm(x).float(), exact, atol=0, rtol=2**-8)
