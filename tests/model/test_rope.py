"""RoPE turns interleaved pairs; YaRN's figures are those of the goldens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dsv3.config import ModelConfig, RopeScaling
from dsv3.model.rope import cos_sin, inverse_frequencies, rotate, softmax_scale, yarn_range
from tests import reference
from tests.variants import BASE, VARIANTS, YARN

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "gate_bias_yarn.json").read_text())["yarn_v3"]
V3 = ModelConfig.preset("v3-671b")


def test_goldens_of_v3():
    inv_freq = inverse_frequencies(V3)
    assert inv_freq.dtype == torch.float32 and inv_freq.shape == (32,)
    assert yarn_range(V3, V3.rope_scaling) == (GOLDEN["low"], GOLDEN["high"])
    for pair, value in GOLDEN["inv_freq"].items():
        assert inv_freq[int(pair)].item() == pytest.approx(value, rel=1e-6)
    assert inv_freq.double().sum().item() == pytest.approx(GOLDEN["inv_freq_sum"], rel=1e-7)
    assert softmax_scale(V3) == pytest.approx(GOLDEN["softmax_scale"], rel=1e-15)
    assert softmax_scale(V3) / 192**-0.5 == pytest.approx(GOLDEN["mscale"] ** 2, rel=1e-14)


def test_without_yarn_v3_has_plain_frequencies_and_scale():
    plain = V3.replace(rope_scaling=None)
    assert softmax_scale(plain) == pytest.approx(0.0721687836, rel=1e-9)
    expected = torch.tensor([10000 ** (-2 * i / 64) for i in range(32)])
    torch.testing.assert_close(inverse_frequencies(plain), expected, rtol=1e-6, atol=0)
    # Pairs up to `low` keep these frequencies, pairs from `high` on turn 40 times more slowly.
    torch.testing.assert_close(inverse_frequencies(V3)[:11], expected[:11], rtol=1e-6, atol=0)
    torch.testing.assert_close(inverse_frequencies(V3)[23:], expected[23:] / 40, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mscale_all_dim", [0.0, 0.707, 1.0])
def test_softmax_scale_grows_with_mscale_all_dim(mscale_all_dim):
    config = BASE.replace(rope_scaling=RopeScaling(40, 4096, mscale=1.0, mscale_all_dim=mscale_all_dim))
    expected = config.qk_head_dim**-0.5 * (1 + 0.1 * mscale_all_dim * math.log(40)) ** 2
    assert softmax_scale(config) == pytest.approx(expected, rel=1e-14)


def test_cos_and_sin_carry_the_ratio_of_the_mscales():
    config = BASE.replace(rope_scaling=YARN)
    ratio = (1 + 0.1 * 0.8 * math.log(8)) / (1 + 0.1 * 1.3 * math.log(8))
    cos, sin = cos_sin(config, inverse_frequencies(config), torch.arange(5))
    torch.testing.assert_close(cos**2 + sin**2, torch.full((5, 4), ratio**2))
    cos, sin = cos_sin(V3, inverse_frequencies(V3), torch.arange(5))
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(5, 32))


def test_a_factor_of_one_is_no_scaling():
    config = BASE.replace(rope_scaling=RopeScaling(1, 64, mscale_all_dim=1.0))
    assert softmax_scale(config) == softmax_scale(BASE)
    torch.testing.assert_close(inverse_frequencies(config), inverse_frequencies(BASE))


SCALINGS = {
    "within the pairs": YARN,
    "from before the first pair": RopeScaling(4, 64, beta_fast=32, beta_slow=1),
    "to behind the last pair": RopeScaling(4, 10**9, beta_fast=32, beta_slow=1),
    "released": V3.rope_scaling,
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("R", [8, 64])
def test_frequencies_are_the_references(scaling, R):
    config = BASE.replace(qk_rope_head_dim=R, rope_scaling=scaling)
    expected = torch.tensor([reference.frequency(config, pair) for pair in range(R // 2)])
    torch.testing.assert_close(inverse_frequencies(config), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["v3", "yarn, no shared experts, D=3"])
def test_pairs_are_interleaved(name, generator):
    config = VARIANTS[name]
    R = config.qk_rope_head_dim
    positions = torch.randint(64, (3, 7), generator=generator)
    x = torch.randn(3, 7, R, dtype=torch.float64, generator=generator)
    out = rotate(x, *cos_sin(config, inverse_frequencies(config), positions))
    for b in range(3):
        for s in range(7):
            expected = reference.rope(x[b, s], int(positions[b, s]), config)
            torch.testing.assert_close(out[b, s], expected, atol=1e-5, rtol=1e-5)


def test_only_the_distance_between_query_and_key_counts(generator):
    inv_freq = inverse_frequencies(V3)
    q, k = torch.randn(2, 64, dtype=torch.float64, generator=generator)

    def product(i: int, j: int) -> float:
        return float(
            rotate(q, *cos_sin(V3, inv_freq, torch.tensor(i))) @ rotate(k, *cos_sin(V3, inv_freq, torch.tensor(j)))
        )

    assert product(0, 0) == pytest.approx(float(q @ k))
    assert product(105, 100) == pytest.approx(product(5, 0), abs=1e-3)
    assert product(5, 0) != pytest.approx(product(0, 5), abs=1e-1)


def test_the_dtype_of_what_is_rotated_stays_and_the_turn_is_float32(generator):
    x = torch.randn(6, 8, generator=generator).bfloat16()
    cos, sin = cos_sin(BASE, inverse_frequencies(BASE), torch.arange(6))
    out = rotate(x, cos, sin)
    assert cos.dtype == sin.dtype == torch.float32 and out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), cos, sin).bfloat16())
