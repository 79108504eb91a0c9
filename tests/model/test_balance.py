"""The bias update by hand-computed cases; the balancer's bookkeeping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsv3.model.balance import LoadBalancer, balanced_bias, max_violation
from dsv3.model.router import Routing
from dsv3.model.transformer import Transformer
from tests.variants import BASE, random_model, random_tokens

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "gate_bias_yarn.json").read_text())["bias_update"]

CASES = [
    (GOLDEN["counts"], GOLDEN["gamma"], [0.0] * 4, GOLDEN["from_zero"]),
    ([10, 30, 20, 20], 0.001, [5.0, 5.0, -1.0, 0.5], [5.001, 4.999, -1.0, 0.5]),
    ([0, 0, 0, 8], 0.5, [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, -0.5]),
    ([3, 3, 3, 3], 0.1, [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),
    ([1, 0, 0], 1.0, [0.0, 0.0, 0.0], [-1.0, 1.0, 1.0]),
    # The mean is 2^25 + 1/3: in FP32 the three counts would all be equal.
    ([2**25, 2**25, 2**25 + 1], 1.0, [0.0, 0.0, 0.0], [1.0, 1.0, -1.0]),
]


@pytest.mark.parametrize(("counts", "gamma", "before", "after"), CASES)
def test_bias_update_by_hand(counts, gamma, before, after):
    bias = balanced_bias(torch.tensor(before), torch.tensor(counts), gamma)
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias, torch.tensor(after), atol=1e-7, rtol=1e-7)


def routing_with(counts: list[int]) -> Routing:
    none = torch.empty(0)
    return Routing(none, none, none, torch.tensor(counts))


def biases(model: Transformer) -> dict[str, list[float]]:
    return {name: [round(b, 6) for b in buffer.tolist()] for name, buffer in model.named_buffers()}


@pytest.fixture
def model() -> Transformer:
    """Two MoE layers: `layers.1` and `mtp.0`, four experts each, biases 0."""
    return Transformer(BASE.replace(n_routed_experts=4, n_group=2))


MAIN, MTP = "layers.1.mlp.router.e_score_correction_bias", "mtp.0.block.mlp.router.e_score_correction_bias"


def test_micro_batches_add_up_and_a_step_moves_every_bias_once(model):
    balancer = LoadBalancer(model)
    # Each micro-batch by itself would move the biases otherwise than their sum does.
    balancer.observe({"layers.1": routing_with([9, 1, 1, 1]), "mtp.0": routing_with([2, 2, 2, 2])})
    balancer.observe({"layers.1": routing_with([0, 4, 4, 4]), "mtp.0": routing_with([0, 1, 3, 4])})
    assert biases(model) == {MAIN: [0.0] * 4, MTP: [0.0] * 4}
    counts = balancer.update(0.01)
    assert {name: c.tolist() for name, c in counts.items()} == {"layers.1": [9, 5, 5, 5], "mtp.0": [2, 3, 5, 6]}
    assert biases(model) == {MAIN: [-0.01, 0.01, 0.01, 0.01], MTP: [0.01, 0.01, -0.01, -0.01]}
    # The next step starts from nothing.
    balancer.observe({"layers.1": routing_with([1, 1, 1, 5]), "mtp.0": routing_with([1, 1, 1, 1])})
    counts = balancer.update(0.01)
    assert counts["layers.1"].tolist() == [1, 1, 1, 5]
    assert biases(model) == {MAIN: [0.0, 0.02, 0.02, 0.0], MTP: [0.01, 0.01, -0.01, -0.01]}


def test_a_layer_that_saw_nothing_is_left_alone(model):
    balancer = LoadBalancer(model)
    balancer.observe({"layers.1": routing_with([0, 2, 1, 1])})  # MTP switched off
    assert balancer.update(0.5)["mtp.0"].tolist() == [0] * 4
    assert biases(model) == {MAIN: [0.5, -0.5, 0.0, 0.0], MTP: [0.0] * 4}


def test_gamma_zero_only_counts(model):
    balancer = LoadBalancer(model)
    balancer.observe({"layers.1": routing_with([0, 2, 1, 1])})
    assert balancer.update(0.0)["layers.1"].tolist() == [0, 2, 1, 1]
    assert biases(model) == {MAIN: [0.0] * 4, MTP: [0.0] * 4}
    assert not balancer.update(0.0)["layers.1"].any()


def test_reset_forgets_a_step_and_harms_no_result_given_out(model):
    balancer = LoadBalancer(model)
    balancer.observe({"layers.1": routing_with([0, 2, 1, 1])})
    counts = balancer.update(0.0)
    balancer.observe({"layers.1": routing_with([7, 0, 0, 0])})
    balancer.reset()
    assert counts["layers.1"].tolist() == [0, 2, 1, 1]
    assert not balancer.update(1.0)["layers.1"].any()
    assert biases(model) == {MAIN: [0.0] * 4, MTP: [0.0] * 4}


def test_the_reduction_sums_over_all_ranks_once_a_step(model):
    calls = []

    def reduce(counts_LE):
        calls.append(counts_LE.tolist())
        return counts_LE + torch.tensor([[9, 0, 0, 0], [0, 0, 0, 0]])  # what another rank counted

    balancer = LoadBalancer(model, reduce)
    balancer.observe({"layers.1": routing_with([0, 1, 1, 1])})
    balancer.observe({"layers.1": routing_with([0, 1, 1, 1])})
    assert balancer.update(0.1)["layers.1"].tolist() == [9, 2, 2, 2]
    assert calls == [[[0, 2, 2, 2], [0, 0, 0, 0]]]
    assert biases(model)[MAIN] == [-0.1, 0.1, 0.1, 0.1]


def test_a_model_without_moe_layers_still_joins_the_reduction():
    calls = []
    dense = Transformer(BASE.replace(first_k_dense_replace=9))
    balancer = LoadBalancer(dense, lambda counts: calls.append(counts.shape) or counts)
    balancer.observe({})
    assert balancer.update(0.1) == {} and len(calls) == 1


def test_a_router_without_bias_is_counted(generator):
    model = random_model(BASE.replace(topk_method="greedy"), generator)
    balancer = LoadBalancer(model)
    balancer.observe(model(random_tokens(BASE, (2, 5), generator)).routings)
    counts = balancer.update(0.1)
    assert counts["layers.1"].sum() == 10 * BASE.num_experts_per_tok
    assert counts["mtp.0"].sum() == 8 * BASE.num_experts_per_tok


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_token_is_counted_once_even_when_its_layer_runs_twice(recompute, generator):
    model = random_model(BASE.replace(num_nextn_predict_layers=2), generator, torch.float64)
    balancer = LoadBalancer(model)
    model.recompute = recompute
    tokens = random_tokens(BASE, (2, 6), generator)
    hidden = model.hidden_states(tokens, aux_loss_scale=0.1)
    balancer.observe(hidden.routings)
    sum(h.sum() for h in (hidden.main_BSD, *hidden.mtp)).backward()
    sums = {name: counts.sum().item() for name, counts in balancer.update(0.1).items()}
    K = BASE.num_experts_per_tok
    assert sums == {"layers.1": 2 * 6 * K, "mtp.0": 2 * 5 * K, "mtp.1": 2 * 4 * K}


def test_balancing_evens_out_the_load(generator):
    model = random_model(BASE, generator)
    model.layers[1].mlp.router.e_score_correction_bias.copy_(torch.tensor([3.0] + [0.0] * 7))
    tokens = random_tokens(BASE, (8, 16), generator)
    balancer, violations = LoadBalancer(model), []
    for _ in range(60):
        with torch.no_grad():
            balancer.observe(model(tokens).routings)
        violations.append(max_violation(balancer.update(0.06)["layers.1"]))
    assert violations[0] == 8 / 2 - 1  # everyone visits expert 0
    assert max(violations[-5:]) < 1.5


@pytest.mark.parametrize("change", ["double", "assign"])
def test_the_balancer_follows_a_model_whose_tensors_are_replaced(change, model):
    balancer = LoadBalancer(model)
    if change == "double":
        model.double()
    else:
        model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    balancer.observe({"layers.1": routing_with([0, 2, 1, 1])})
    balancer.update(0.5)
    assert biases(model)[MAIN] == [0.5, -0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("counts", "expected"), [([5, 5, 5, 5], 0.0), ([20, 0, 0, 0], 3.0), ([10, 30, 20, 20], 0.5), ([3, 1], 0.5)]
)
def test_max_violation(counts, expected):
    assert max_violation(torch.tensor(counts)) == pytest.approx(expected)
