"""`plan comm`: expected nodes against enumeration and simulation, and the report's numbers."""

import dataclasses
import io
import itertools
import json
import random

import pytest
from rich.console import Console

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.plan.comm import expected_units, expert_traffic, most_units, plan_comm, render, row_bytes
from dsv3.plan.hardware import find_gpu
from tests.variants import BASE

V3, H800 = ModelConfig.preset("v3-671b"), find_gpu("H800")


def routed(experts: int, groups: int, open_groups: int, chosen: int, method: str = "noaux_tc") -> ModelConfig:
    return BASE.replace(
        n_routed_experts=experts,
        n_group=groups,
        topk_group=open_groups,
        num_experts_per_tok=chosen,
        topk_method=method,
    )


@pytest.mark.parametrize(
    "shape", [(8, 4, 2, 2), (8, 4, 1, 2), (12, 4, 2, 3), (12, 3, 2, 4), (16, 4, 3, 5), (6, 1, 1, 2)]
)
def test_expected_units_is_the_mean_over_all_choices(shape: tuple[int, int, int, int]) -> None:
    E, G, M, K = shape
    config, group = routed(*shape), E // G
    for units in (u for u in range(1, E + 1) if E % u == 0):
        reached = [
            len({expert * units // E for expert in experts})
            for groups in itertools.combinations(range(G), M)
            for experts in itertools.combinations([g * group + i for g in groups for i in range(group)], K)
        ]
        assert expected_units(config, units) == pytest.approx(sum(reached) / len(reached)), units
        assert most_units(config, units) >= max(reached)


def test_greedy_routing_knows_no_groups() -> None:
    assert expected_units(routed(16, 4, 1, 3, "greedy"), 8) == expected_units(routed(16, 1, 1, 3), 8)


def test_what_the_report_says_of_its_network() -> None:
    plan = plan_comm(V3, H800, nodes=8)
    assert plan.most_nodes == 4
    assert plan.free_experts_per_node == pytest.approx(3.2)
    assert round(plan.free_experts) == 13
    assert plan.experts_per_gpu == 4
    # FP8 with a scale per 128 out, BF16 back; 4 of 8 groups, 8 of their 128 experts, 7 of 8 nodes are others.
    assert (plan.dispatch_bytes, plan.combine_bytes) == (7168 + 4 * 56, 2 * 7168)
    reached = 4 * (1 - _choose(96, 8) / _choose(128, 8))
    assert plan.traffic.nodes_reached == pytest.approx(reached)
    assert plan.traffic.network_bytes == pytest.approx((7392 + 14336) * reached * 7 / 8)
    assert plan.traffic.network_seconds == pytest.approx(plan.traffic.network_bytes / 50e9)
    assert plan.traffic.nvlink_seconds < plan.traffic.network_seconds  # so NVLink costs no time, as the report says
    assert plan.traffic.nodes_reached_without_limit > plan.traffic.nodes_reached
    assert plan.network_bytes_per_token == pytest.approx(2 * 59 * plan.traffic.network_bytes)


def _choose(n: int, k: int) -> float:
    out = 1.0
    for i in range(k):
        out *= (n - i) / (k - i)
    return out


def test_hidden_share_is_computation_over_communication() -> None:
    slow = dataclasses.replace(H800, network_bandwidth=5e9)
    plan = plan_comm(V3, slow, nodes=8)
    assert plan.communication_seconds == plan.traffic.network_seconds
    assert plan.hidden_forward == pytest.approx(plan.compute_seconds / plan.communication_seconds)
    assert plan.hidden_pair == pytest.approx(1.5 * plan.hidden_forward)
    assert plan.hidden_pair < 1
    assert plan.hidden_backward == pytest.approx(min(1, 2 * plan.hidden_forward))
    # As many remote nodes as fit beside a pair take exactly as long as the pair.
    seconds = plan.hidden_nodes * (plan.dispatch_bytes + plan.combine_bytes) / 5e9
    assert 2 * seconds == pytest.approx(3 * plan.compute_seconds)
    for t in plan.scaling:
        assert (t.nodes <= plan.largest_hidden_node_count) == (t.seconds <= 1.5 * plan.compute_seconds)
    assert 0 < plan.largest_hidden_node_count < 8
    assert plan_comm(V3, H800, nodes=8).largest_hidden_node_count == plan.scaling[-1].nodes == 32


def test_within_a_node_only_nvlink_carries() -> None:
    one, part = expert_traffic(V3, H800, 8, "bf16"), expert_traffic(V3, H800, 4, "bf16")
    assert one.network_bytes == part.network_bytes == 0
    assert one.nvlink_bytes == pytest.approx(4 * 7168 * expected_units(V3, 8) * 7 / 8)
    assert part.nvlink_bytes == pytest.approx(4 * 7168 * expected_units(V3, 4) * 3 / 4)
    assert expert_traffic(V3, H800, 1, "bf16").seconds == 0


def _simulate(
    config: ModelConfig, tokens: int, together: float, rng: random.Random
) -> tuple[list[list[int]], dict[int, float]]:
    """Co-selection counts and mean units reached of tokens that draw experts, favouring their first one's unit."""
    E, K = config.n_routed_experts, config.num_experts_per_tok
    pairs = [[0] * E for _ in range(E)]
    reached = {units: 0 for units in (2, 4, 8)}
    for _ in range(tokens):
        first = min(E - 1, int(rng.random() ** 1.5 * E))  # low experts are busier
        chosen = {first}
        while len(chosen) < K:
            near = rng.random() < together
            chosen.add(first // 4 * 4 + rng.randrange(4) if near else rng.randrange(E))
        for i in chosen:
            for j in chosen:
                pairs[i][j] += 1
        for units in reached:
            reached[units] += len({i * units // E for i in chosen})
    return pairs, {units: count / tokens for units, count in reached.items()}


@pytest.mark.parametrize("together", [0.0, 0.5, 0.9])
def test_measured_co_selection_predicts_the_nodes_reached(together: float, seed: int) -> None:
    config = routed(32, 1, 1, 4)
    pairs, truth = _simulate(config, 4000, together, random.Random(seed))
    four = dataclasses.replace(H800, gpus_per_node=1)
    scaling = {t.nodes: t.nodes_reached for t in plan_comm(config, four, nodes=4, routing=pairs).scaling}
    for units, reached in truth.items():
        assert scaling[units] == pytest.approx(reached, rel=0.06)
    loads = [pairs[i][i] for i in range(32)]
    by_load = plan_comm(config, four, nodes=8, routing=loads)
    assert by_load.routing == "measured loads"
    if together == 0:
        assert by_load.traffic.nodes_reached == pytest.approx(truth[8], rel=0.03)
    else:  # loads cannot know that experts of a unit come together
        assert by_load.traffic.nodes_reached > 1.1 * truth[8]


def test_uniform_measurements_agree_with_uniform_routing() -> None:
    config, gpu = routed(32, 1, 1, 4), dataclasses.replace(H800, gpus_per_node=2)
    uniform = plan_comm(config, gpu, nodes=4).traffic
    by_load = plan_comm(config, gpu, nodes=4, routing=[7.0] * 32).traffic
    pair = 31.0 * 32  # each ordered pair of different experts in K (K - 1) of E (E - 1) tokens
    matrix = [[pair * 31 * 4 / 12 if i == j else pair for j in range(32)] for i in range(32)]
    by_pairs = plan_comm(config, gpu, nodes=4, routing=matrix).traffic
    for measured in (by_load, by_pairs):
        assert measured.nodes_reached == pytest.approx(uniform.nodes_reached)
        assert measured.gpus_reached == pytest.approx(uniform.gpus_reached)


def test_experts_that_always_come_together_reach_one_unit() -> None:
    config, gpu = routed(8, 1, 1, 4), dataclasses.replace(H800, gpus_per_node=1)
    block = [[10.0 if i // 4 == j // 4 else 0.0 for j in range(8)] for i in range(8)]
    assert plan_comm(config, gpu, nodes=2, routing=block).traffic.nodes_reached == pytest.approx(1)


def test_result_is_json_and_prints() -> None:
    plan = plan_comm(V3, H800)
    assert json.loads(json.dumps(plan.to_dict()))["traffic"]["nodes"] == 8
    console = Console(file=io.StringIO(), width=120)
    console.print(render(plan))
    assert "3.63 (4)" in console.file.getvalue()


def test_row_bytes_round_the_last_tile_up() -> None:
    assert row_bytes(BASE.replace(hidden_size=130), "fp8") == 130 + 8
    assert row_bytes(BASE.replace(hidden_size=130), "bf16") == 260


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (V3, {"nodes": 3}, "node counts that work: 1, 2, 4, 8, 16, 32"),
        (V3, {"efficiency": 0.0}, "efficiency is 0.0"),
        (V3.replace(first_k_dense_replace=61), {}, "no MoE layer"),
        (V3, {"routing": [1.0] * 7}, r"7 rows of \[1\] values, expected \[256\] loads or \[256, 256\] pairs"),
        (V3, {"routing": [-1.0] * 256}, "negative or non-finite"),
        (V3, {"routing": [float("nan")] * 256}, "negative or non-finite"),
        (V3, {"routing": [0.0] * 256}, "no token at all"),
        (V3, {"routing": [[1.0] * 256] * 256}, "256.00 experts each, but the config chooses 8"),
    ],
)
def test_bad_input_is_refused(config: ModelConfig, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_comm(config, H800, **options)  # type: ignore[arg-type]
