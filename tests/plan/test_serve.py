"""`plan serve`: units that fit and are fast enough, the published deployment, and the published bounds."""

import dataclasses
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.plan.hardware import find_gpu
from dsv3.plan.model import checkpoint_bytes
from dsv3.plan.serve import (
    Service,
    experts_per_gpu,
    plan_decode,
    plan_prefill,
    plan_serve,
    reference_units,
    render,
    speculative_tokens_per_step,
    step_seconds,
    weight_bytes,
)
from tests.variants import BASE

V3, H800 = ModelConfig.preset("v3-671b"), find_gpu("H800")
LOAD = Service(input_tokens_per_second=7e6, output_tokens_per_second=2e6, cache_hits=0.563)


@given(acceptance=st.lists(st.floats(0, 1), max_size=6))
def test_tokens_per_step_is_the_expected_run_of_accepted_drafts(acceptance: list[float]) -> None:
    expected, reached = 0.0, 1.0
    for depth, p in enumerate([*acceptance, 0.0]):  # a run of exactly `depth` drafts, then the model's own token
        expected += reached * (1 - p) * (depth + 1)
        reached *= p
    assert speculative_tokens_per_step(acceptance) == pytest.approx(expected)


def test_one_draft_gives_one_plus_p() -> None:
    assert speculative_tokens_per_step(()) == 1
    assert speculative_tokens_per_step((0.85,)) == pytest.approx(1.85)
    assert speculative_tokens_per_step((0.9, 0.5)) == pytest.approx(1 + 0.9 + 0.45)


def test_published_units_hold_the_published_experts() -> None:
    assert experts_per_gpu(V3, 32, LOAD) == 9
    assert experts_per_gpu(V3, 144, LOAD) == 2
    assert experts_per_gpu(V3, 320, dataclasses.replace(LOAD, redundant_experts=64)) == 1
    prefill, decode, minimal = reference_units(LOAD)
    assert [(r.gpus, r.experts_per_gpu) for r in (prefill, decode, minimal)] == [(32, 9), (144, 2), (320, 1)]
    assert prefill.reported_per_node == pytest.approx(73_700 * 0.437)
    assert decode.reported_per_node == 14_800
    # A day's average of a real service lies below a full one's bound, but not by orders of magnitude.
    for unit in (prefill, decode):
        assert unit.reported_per_node is not None
        assert 0.25 < unit.reported_per_node / unit.planned_per_node < 1


def test_one_gpu_holds_the_whole_checkpoint() -> None:
    """All experts on one GPU: the checkpoint without its MTP layer, whose head and embedding are copies."""
    alone = dataclasses.replace(LOAD, redundant_experts=0)
    for precision in ("fp8", "bf16"):
        service = dataclasses.replace(alone, precision=precision)
        bias = 58 * 256 * 2  # FP32 in a checkpoint, two bytes here
        no_mtp = checkpoint_bytes(V3.replace(num_nextn_predict_layers=0), precision)
        assert weight_bytes(V3, 256, service) == pytest.approx(no_mtp - bias, abs=1)
    with_mtp = weight_bytes(V3, 256, dataclasses.replace(alone, acceptance=(0.8,)))
    assert with_mtp - weight_bytes(V3, 256, alone) == pytest.approx(11.6e9, rel=0.05)


def test_communication_is_the_published_bound() -> None:
    """arXiv 2505.09343, section 2.3.2: 32 tokens a device, 9 copies, 1 + 2 bytes, 7K wide, 50 GB/s: 120.96 us."""
    full_rate = dataclasses.replace(LOAD, network=1.0, context=1)
    seconds = step_seconds(V3, H800, full_rate, 32)["communication"] / 58
    published = 120.96e-6 * (8 / 9) * (7168 / 7000)  # the shared expert is local here; 7,168 for "7K"
    scales = (7392 + 14336) / (3 * 7168)
    assert seconds == pytest.approx(published * scales)


@given(batch=st.integers(1, 500), context=st.integers(1, 100_000), drafts=st.integers(0, 2))
def test_a_step_is_its_slower_half_and_grows(batch: int, context: int, drafts: int) -> None:
    service = dataclasses.replace(LOAD, context=context, acceptance=(0.5,) * drafts)
    parts = step_seconds(V3, H800, service, batch)
    assert parts["step"] == max(parts["attention"] + parts["matrices"], parts["communication"])
    more = step_seconds(V3, H800, service, batch + 1)
    longer = step_seconds(V3, H800, dataclasses.replace(service, context=2 * context), batch)
    assert more["step"] >= parts["step"]
    assert longer["attention"] == pytest.approx(2 * parts["attention"])
    assert parts["communication"] == pytest.approx(batch * step_seconds(V3, H800, service, 1)["communication"])


@pytest.mark.parametrize("acceptance", [(), (0.85,), (0.85, 0.6)])
@pytest.mark.parametrize("limit", [0.02, 0.05])
def test_the_planned_batch_is_the_largest_that_is_fast_enough_and_fits(
    acceptance: tuple[float, ...], limit: float
) -> None:
    service = dataclasses.replace(LOAD, acceptance=acceptance, seconds_per_token=limit)
    unit = plan_decode(V3, H800, service)
    tokens = speculative_tokens_per_step(acceptance)
    usable = 0.9 * H800.memory_bytes

    def allowed(batch: int) -> bool:
        fast = step_seconds(V3, H800, service, batch)["step"] / tokens <= limit
        return fast and unit.weight_bytes + unit.cache_bytes / unit.batch * batch <= usable

    assert allowed(unit.batch)
    assert not allowed(unit.batch + 1)
    assert unit.tokens_per_second_per_gpu == pytest.approx(unit.batch / unit.latency)
    assert unit.cache_bytes == unit.batch * 4989 * 1152 * (61 + min(1, len(acceptance)))
    assert (unit.units - 1) * unit.gpus * unit.tokens_per_second_per_gpu < 2e6
    assert unit.total_gpus * unit.tokens_per_second_per_gpu >= 2e6


def test_memory_limits_the_batch_of_long_contexts() -> None:
    service = dataclasses.replace(LOAD, context=131_072, seconds_per_token=1.0)
    unit = plan_decode(V3, H800, service)
    room = 0.9 * H800.memory_bytes - unit.weight_bytes
    assert unit.batch == int(room // (131_072 * 70_272))


def test_speculation_pays_most_where_weights_are_read_for_few_requests() -> None:
    """At one request a GPU, reading weights is all there is: the report's 1.8x for an acceptance of 85 to 90 %."""
    plain, drafted = LOAD, dataclasses.replace(LOAD, acceptance=(0.875,))
    gains = [
        1.875 * step_seconds(V3, H800, plain, batch)["step"] / step_seconds(V3, H800, drafted, batch)["step"]
        for batch in (1, 16, 256)
    ]
    assert gains[0] == pytest.approx(1.8, abs=0.05)
    assert gains[0] > gains[1] > gains[2]
    plan = plan_serve(V3, H800, drafted)
    both = [step_seconds(V3, H800, s, plan.decode.batch)["step"] for s in (plain, drafted)]
    assert plan.speculation.speed == pytest.approx(1.875 * both[0] / both[1])
    plain_rate = plan_decode(V3, H800, plain).tokens_per_second_per_gpu
    assert plan.speculation.throughput == pytest.approx(plan.decode.tokens_per_second_per_gpu / plain_rate)


def test_a_target_met_only_with_drafts_has_no_throughput_to_compare() -> None:
    slow = step_seconds(V3, H800, LOAD, 1)["step"]
    service = dataclasses.replace(LOAD, acceptance=(1.0,), seconds_per_token=0.9 * slow)
    plan = plan_serve(V3, H800, service)
    assert plan.speculation.throughput is None
    assert plan.decode.latency <= 0.9 * slow


def test_prefill_carries_what_no_cache_holds() -> None:
    all_of_it = plan_prefill(V3, H800, dataclasses.replace(LOAD, cache_hits=0.0))
    unit = plan_prefill(V3, H800, LOAD)
    assert unit.tokens_per_second_per_gpu == all_of_it.tokens_per_second_per_gpu
    needed = 7e6 * 0.437 / unit.tokens_per_second_per_gpu / 32
    assert needed <= unit.units < needed + 1
    assert all_of_it.units > unit.units
    assert unit.latency == pytest.approx(4096 / unit.tokens_per_second_per_gpu)
    assert plan_prefill(V3, H800, dataclasses.replace(LOAD, prompt=32_768)).tokens_per_second_per_gpu < (
        unit.tokens_per_second_per_gpu
    )


def test_a_small_model_runs_on_one_gpu_without_communication() -> None:
    service = Service(100, 100, context=64, prompt=64, prefill_gpus=1, decode_gpus=1)
    plan = plan_serve(BASE, find_gpu("RTX 4090"), service)
    assert plan.prefill.seconds["communication"] == plan.decode.seconds["communication"] == 0
    assert plan.prefill.experts_per_gpu == plan.decode.experts_per_gpu == BASE.n_routed_experts
    assert plan.total_gpus == 2


def test_result_is_json_and_prints() -> None:
    plan = plan_serve(V3, H800, dataclasses.replace(LOAD, acceptance=(0.85,)))
    assert json.loads(json.dumps(plan.to_dict()))["decode"]["experts_per_gpu"] == 2
    console = Console(file=io.StringIO(), width=120)
    console.print(render(plan))
    text = console.file.getvalue()
    assert "1.85 tokens a step" in text
    assert "14,800" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill_gpus": 8}, r"a prefill unit of 8 H800 puts .* GiB of weights on a GPU that has 72.0 GiB"),
        ({"decode_gpus": 8}, "a decode unit of 8 H800 puts"),
        ({"seconds_per_token": 1e-3}, "even of one request, more than the 1.00 ms asked for"),
        ({"context": 10**7, "seconds_per_token": 100.0}, "cache of 10000000 tokens .* does not fit"),
        ({"cache_hits": 1.5}, "cache_hits is 1.5"),
        ({"acceptance": (0.5, 2.0)}, "acceptance is 2.0"),
        ({"output_tokens_per_second": 0.0}, "output_tokens_per_second is 0.0"),
        ({"compute": 0.0}, "compute is 0.0"),
        ({"headroom": 1.0}, "headroom is 1.0"),
        ({"redundant_experts": -1}, "redundant_experts is -1"),
        ({"prefill_gpus": 36}, "36 expert-parallel GPUs are neither whole nodes of 8"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_serve(V3, H800, dataclasses.replace(LOAD, **changes))  # type: ignore[arg-type]


def test_drafts_need_an_mtp_module() -> None:
    with pytest.raises(UserError, match="no MTP module to draft with"):
        plan_serve(V3.replace(num_nextn_predict_layers=0), H800, dataclasses.replace(LOAD, acceptance=(0.8,)))
