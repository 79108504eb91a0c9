"""Quantised weights: as near as their steps allow, and their kernels give what the dequantised weight gives."""

from __future__ import annotations

import pytest
import torch

from dsv3.ops.packed import can_pack
from dsv3.ops.quantized import (
    GROUP,
    Int4Weight,
    Int8DynamicWeight,
    Int8Weight,
    dequantize_groups,
    dequantize_int4,
    quantize_groups,
    quantize_rows,
)


def needs(kind):
    return pytest.mark.skipif(
        not (kind.available() and can_pack(torch.empty(0, dtype=torch.bfloat16))),
        reason=f"this CPU or this torch has no kernel for {kind.__name__}",
    )


def weight_and_rows(generator, shape, rows):
    """Outputs and rows of very different sizes, so that a scale in the wrong place shows."""
    sizes_O1, sizes_N1 = (torch.exp(3 * torch.randn(count, 1, generator=generator)) for count in (shape[0], rows))
    weight = torch.randn(shape, generator=generator) * sizes_O1
    x = torch.randn(rows, shape[1], generator=generator) * sizes_N1
    return weight.bfloat16(), x.bfloat16()


def made(kind, weight):
    return kind(kind.quantize(weight))


def check(out, x, weight):
    """BF16's rounding, of the result and of one product inside, relative to what the sums are made of."""
    exact, scale = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert out.dtype == torch.bfloat16 and out.shape == exact.shape
    assert ((out.double() - exact).abs() <= 2**-7 * exact.abs() + 2**-16 * scale).all()


def test_int8_is_off_by_half_a_step_at_most(generator):
    weight, _ = weight_and_rows(generator, (40, 64), 1)
    weight[3] = 0
    q, scale = quantize_rows(weight)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and q.abs().max() == 127
    assert (q[3] == 0).all()
    error = (q * scale.float() - weight.float()).abs()
    assert (error <= 0.51 * scale.float()).all() and (error > 0.3 * scale.float()).any()


def test_int4_is_off_by_half_a_step_at_most_in_each_group(generator):
    weight, _ = weight_and_rows(generator, (16, 4 * GROUP), 1)
    weight[2, :GROUP] += 100 * weight[2].abs().max()  # a group far from 0: the zero matters
    weight[5, GROUP : 2 * GROUP] = 0
    q, scale, zero = quantize_groups(weight)
    assert q.min() == 0 and q.max() == 15 and scale.shape == zero.shape == (16, 4)
    assert torch.equal(dequantize_int4(Int4Weight.quantize(weight)), dequantize_groups(q, scale, zero))
    error = (dequantize_groups(q, scale, zero) - weight.float()).abs().unflatten(1, (4, GROUP))
    # The rounding of the zero to BF16 moves all of a group's steps.
    allowed = 0.55 * scale.float() + 2**-7 * zero.float().abs()
    assert (error <= allowed.unsqueeze(-1)).all()
    assert (error[5, 1] == 0).all()
    near = torch.arange(16) != 2
    assert (error[near] <= 0.6 * scale.float()[near].unsqueeze(-1)).all()


ROWS = [1, 17, 70]


@needs(Int8Weight)
@pytest.mark.parametrize("shape", [(24, 16), (1, 40), (2100, 512)])
@pytest.mark.parametrize("rows", ROWS)
def test_int8_multiplies_by_the_dequantised_weight(rows, shape, generator):
    assert Int8Weight.fits(*shape)
    weight, x = weight_and_rows(generator, shape, rows)
    q, scale = quantize_rows(weight)
    check(made(Int8Weight, weight).linear(x), x, q.double() * scale.double())


@needs(Int4Weight)
@pytest.mark.parametrize("shape", [(16, 64), (9, 192), (2100, 512)])
@pytest.mark.parametrize("rows", ROWS)
def test_int4_multiplies_by_the_dequantised_weight_in_bf16(rows, shape, generator):
    assert Int4Weight.fits(*shape)
    weight, x = weight_and_rows(generator, shape, rows)
    check(made(Int4Weight, weight).linear(x), x, dequantize_groups(*quantize_groups(weight)).bfloat16())


@needs(Int8DynamicWeight)
@pytest.mark.parametrize("shape", [(24, 16), (7, 48), (2100, 512)])
def test_int8_dynamic_multiplies_many_rows_rounded(shape, generator):
    weight, x = weight_and_rows(generator, shape, 40)
    (q_x, scale_x), (q_w, scale_w) = quantize_rows(x), quantize_rows(weight)
    out = made(Int8DynamicWeight, weight).linear(x)
    check(out, q_x.double() * scale_x.double(), q_w.double() * scale_w.double())


@needs(Int8DynamicWeight)
@pytest.mark.parametrize("rows", [1, 16])
def test_int8_dynamic_multiplies_a_few_rows_as_they_are(rows, generator):
    weight, x = weight_and_rows(generator, (24, 64), rows)
    if not Int8DynamicWeight.quantize(weight).is_taken:
        pytest.skip("there is no kernel of our own here")
    with torch.inference_mode():
        assert torch.equal(made(Int8DynamicWeight, weight).linear(x), made(Int8Weight, weight).linear(x))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs(kind)) for kind in (Int8Weight, Int4Weight, Int8DynamicWeight)]
)
def test_any_leading_shape_and_strides(kind, generator):
    weight, x = weight_and_rows(generator, (16, 64), 30)
    quantized = made(kind, weight)
    whole = quantized.linear(x)
    x_last = x.view(5, 6, 64).transpose(0, 1)[:, -1]
    torch.testing.assert_close(quantized.linear(x_last), whole.view(5, 6, 16)[-1])
    assert quantized.linear(x.view(5, 6, 64)).shape == (5, 6, 16)
    assert quantized.linear(x[:0]).shape == (0, 16)


@pytest.mark.parametrize(("kind", "shape"), [(Int8DynamicWeight, (16, 24)), (Int4Weight, (16, 96))])
def test_shapes_that_the_kernel_does_not_take(kind, shape):
    assert not kind.fits(*shape)
