"""E4M3 blocks against a twin that walks the blocks one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3.ops.fp8 import dequantize_blocks, quantize_blocks, scale_shape

SHAPES = [(128, 128), (256, 384), (1, 1), (127, 129), (576, 200), (130, 64)]


def slow_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = w.shape
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = torch.full(scale_shape((rows, columns)), float("nan"))
    for r in range(0, rows, 128):
        for c in range(0, columns, 128):
            block = w[r : r + 128, c : c + 128].float()
            s = max(block.abs().max().item(), 1e-4)
            s = torch.tensor(s, dtype=torch.float32) / 448
            scale[r // 128, c // 128] = s
            q[r : r + 128, c : c + 128] = (block / s).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q, scale


def slow_dequantize(q: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty(q.shape)
    for i in range(q.shape[0]):
        for j in range(q.shape[1]):
            out[i, j] = q[i, j].float() * scale[i // 128, j // 128]
    return out


def bits(q: Tensor) -> Tensor:
    return q.view(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_is_the_slow_twin(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    # Magnitudes spread over blocks, so that a scale in the wrong place shows.
    w = torch.randn(shape, generator=generator) * torch.logspace(-3, 2, shape[1])
    q, scale = quantize_blocks(w.to(dtype))
    slow_q, slow_scale = slow_quantize(w.to(dtype))
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert torch.equal(bits(q), bits(slow_q))
    assert torch.equal(scale, slow_scale)


def test_dequantize_is_the_slow_twin(generator: torch.Generator) -> None:
    q = torch.randint(-64, 64, (131, 140), generator=generator).float().to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape(q.shape), generator=generator)
    assert torch.equal(dequantize_blocks(q, scale), slow_dequantize(q, scale))


def test_error_is_that_of_four_significant_bits(generator: torch.Generator) -> None:
    w = torch.randn(300, 260, generator=generator)
    back = dequantize_blocks(*quantize_blocks(w))
    amax = w.abs().max().item()
    # Half a step: 2^-4 of the value, or of the smallest normal number (2^-6 of 448's scale) below it.
    assert ((back - w).abs() <= w.abs() * 2**-4 + amax / 448 * 2**-10).all()
    assert not torch.equal(back, w)


def test_the_largest_entry_survives_and_zeros_stay_zero() -> None:
    w = torch.zeros(128, 256)
    w[3, 7] = -5.0
    q, scale = quantize_blocks(w)
    assert q[3, 7].float() == -448
    assert torch.equal(dequantize_blocks(q, scale)[3, 7], torch.tensor(-5.0))
    assert torch.equal(scale[0, 1], torch.tensor(1e-4) / 448)
    assert dequantize_blocks(q, scale)[:, 128:].abs().max() == 0


def test_quantizing_what_was_quantized_keeps_the_payload(generator: torch.Generator) -> None:
    q, scale = quantize_blocks(torch.randn(200, 300, generator=generator))
    again, scale_again = quantize_blocks(dequantize_blocks(q, scale))
    assert torch.equal(bits(again), bits(q))
    torch.testing.assert_close(scale_again, scale, rtol=2**-22, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_shows_in_its_blocks_scale_only(bad: float) -> None:
    w = torch.ones(256, 128)
    w[200, 5] = bad
    scale = quantize_blocks(w)[1]
    assert scale[0, 0].isfinite() and not scale[1, 0].isfinite()


def test_rounding_to_bf16_happens_once(generator: torch.Generator) -> None:
    q, scale = quantize_blocks(torch.randn(128, 128, generator=generator))
    assert torch.equal(dequantize_blocks(q, scale, torch.bfloat16), slow_dequantize(q, scale).to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(128, 128), (100, 130)])
def test_inputs_are_left_alone(shape: tuple[int, int], generator: torch.Generator) -> None:
    w = torch.randn(shape, generator=generator).T
    before = w.clone()
    q, scale = quantize_blocks(w)
    kept = q.clone(), scale.clone()
    dequantize_blocks(q, scale)
    assert torch.equal(w, before) and torch.equal(bits(q), bits(kept[0])) and torch.equal(scale, kept[1])
    assert torch.equal(bits(q), bits(slow_quantize(before)[0]))
