"""`plan cost`: the report's table to the dollar, and the published utilisation."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.plan.cost import plan_cost, render, report_costs, utilisation
from dsv3.plan.hardware import find_gpu
from tests.variants import BASE

V3, H800 = ModelConfig.preset("v3-671b"), find_gpu("H800")


def test_the_reports_table_comes_out_to_the_dollar() -> None:
    cost = report_costs()
    assert [(s.stage, s.gpu_hours, s.dollars) for s in cost.stages] == [
        ("pre-training", 2_664_000, 5_328_000),
        ("context extension", 119_000, 238_000),
        ("post-training", 5_000, 10_000),
    ]
    assert (cost.gpu_hours, cost.dollars) == (2_788_000, 5_576_000)
    assert cost.gpu_hours_per_trillion == 180_000
    assert round(cost.days_per_trillion, 1) == 3.7
    assert cost.days < 60  # "less than two months"


def test_published_utilisation_follows_from_published_speed() -> None:
    """arXiv 2505.09343, table 4: 272.80B tokens a day on 2,048 H800 is 38.94 % causal, 43.73 % full, of BF16."""
    rows = {u.counting: u for u in utilisation(V3, H800, 272.80e9 / 86400 / 2048)}
    assert rows["causal attention"].mfu_bf16 == pytest.approx(0.3894, abs=0.002)
    assert rows["full attention"].mfu_bf16 == pytest.approx(0.4373, abs=0.002)
    assert rows["causal attention"].flops_per_second == pytest.approx(385e12, rel=0.005)
    assert rows["full attention"].flops_per_second == pytest.approx(432e12, rel=0.005)
    # The report's own 180K hours per trillion tokens are the same speed.
    assert report_costs().utilisation[0].mfu_bf16 == pytest.approx(0.3894, abs=0.002)


@given(mfu=st.floats(0.01, 1), tokens=st.floats(1e6, 1e14), gpus=st.integers(1, 10_000), context=st.integers(1, 10_000))
def test_the_three_ways_to_give_a_speed_agree(mfu: float, tokens: float, gpus: int, context: int) -> None:
    common = {"tokens": tokens, "gpus": gpus, "dollars_per_hour": 3.0, "context": context}
    assumed = plan_cost(BASE, H800, mfu=mfu, **common)
    measured = plan_cost(BASE, H800, tokens_per_second_per_gpu=assumed.tokens_per_second_per_gpu, **common)
    published = plan_cost(BASE, H800, gpu_hours_per_trillion=assumed.gpu_hours_per_trillion, **common)
    for other in (measured, published):
        assert other.dollars == pytest.approx(assumed.dollars)
        assert other.utilisation[0].mfu_bf16 == pytest.approx(mfu)
    assert assumed.dollars == pytest.approx(3 * assumed.gpu_hours)
    assert assumed.days * 24 * gpus == pytest.approx(assumed.gpu_hours)
    assert assumed.gpu_hours == pytest.approx(assumed.gpu_hours_per_trillion * tokens / 1e12)


def test_countings_are_ordered_and_a_gpu_without_fp8_has_no_fp8_share() -> None:
    rows = {u.counting: u.flops_per_token for u in utilisation(V3, H800, 1000)}
    assert rows["6 N"] < rows["causal attention"] < rows["causal attention, with MTP"] < rows["full attention"]
    assert rows["6 N"] == 6 * 36_625_618_432
    assert all(u.mfu_fp8 is None for u in utilisation(V3, find_gpu("A100-80GB"), 1000))
    assert utilisation(V3, H800, 1000)[0].mfu_fp8 == pytest.approx(
        utilisation(V3, H800, 1000)[0].mfu_bf16 / 2, rel=1e-3
    )


def test_result_is_json_and_prints() -> None:
    cost = report_costs()
    assert json.loads(json.dumps(cost.to_dict()))["dollars"] == 5_576_000
    console = Console(file=io.StringIO(), width=120)
    console.print(render(cost))
    assert "$5,576,000" in console.file.getvalue()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no speed given, expected exactly one of mfu, tokens_per_second_per_gpu, gpu_hours_per_trillion"),
        ({"mfu": 0.4, "gpu_hours_per_trillion": 1e5}, "mfu and gpu_hours_per_trillion given, expected exactly one"),
        ({"mfu": 40.0}, "mfu is 40.0, expected a share of the peak: 0.39 for 39 %"),
        ({"mfu": -0.1}, "mfu is -0.1, expected a finite number above 0"),
        ({"mfu": 0.4, "tokens": 0}, "tokens is 0"),
        ({"mfu": 0.4, "gpus": -1}, "gpus is -1"),
        ({"mfu": 0.4, "dollars_per_hour": float("nan")}, "dollars_per_hour is nan"),
        ({"mfu": 0.4, "other_gpu_hours": {"extension": -5.0}}, "extension is -5.0"),
        ({"mfu": 0.4, "other_gpu_hours": {"pre-training": 5.0}}, "give only other stages"),
    ],
)
def test_bad_input_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_cost(BASE, H800, **{"tokens": 1e9, "gpus": 8, "dollars_per_hour": 2.0, **options})  # type: ignore[arg-type]
