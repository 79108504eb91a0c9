"""A tensor in large pages is the tensor, in memory of its own that lives as long as it does."""

from __future__ import annotations

import gc

import pytest
import torch

from dsv3.ops.large_pages import in_large_pages


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.uint8, torch.float32])
def test_the_same_values_elsewhere(dtype, generator):
    x = torch.randint(100, (3, 700_001), generator=generator).to(dtype)
    copy = in_large_pages(x)
    assert torch.equal(copy, x) and copy.dtype == dtype and copy.is_contiguous()
    assert copy.data_ptr() != x.data_ptr() and copy.data_ptr() % 4096 == 0
    part = in_large_pages(x)[1]
    gc.collect()
    torch.randint(100, (3, 700_001))
    assert torch.equal(part, x[1])


def test_of_rows_that_lie_apart_too(generator):
    x = torch.randn(2000, 2000, generator=generator).T
    assert torch.equal(in_large_pages(x), x) and in_large_pages(x).is_contiguous()


def test_what_is_small_stays():
    x = torch.ones(1000)
    assert in_large_pages(x) is x
