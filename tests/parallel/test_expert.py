"""Experts on several ranks give every token the answer, and every weight the gradient, that one process gives."""

import pytest
import torch

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.model.experts import DeepSeekMoE
from dsv3.parallel.expert import distribute_experts
from dsv3.parallel.mesh import Axis, Mesh
from tests.parallel.expert_cases import count_rows_between_nodes, dispatch_and_back, wires_in_turn


def check(world, limit, **case):
    for rank, differences in enumerate(world.run(dispatch_and_back, **case)):
        for name, value in differences.items():
            assert value <= limit, f"rank {rank}: {name} differs by {value:.2g}"


@pytest.mark.parametrize("how", ["sent", "cut", "split", "naive"])
@pytest.mark.parametrize(("tokens", "choose"), [([7, 12], "any"), ([5, 9], "first"), ([0, 8], "any"), ([0, 0], "any")])
def test_two_ranks(world2, seed, tokens, choose, how):
    check(world2, 1e-13, seed=seed, tokens=tokens, choose=choose, how=how, node_size=2)


@pytest.mark.parametrize("how", ["sent", "naive"])
@pytest.mark.parametrize(
    ("tokens", "choose"), [([7, 12, 3, 9], "any"), ([5, 0, 9, 1], "first"), ([0, 11, 0, 0], "any")]
)
def test_four_ranks(world4, seed, tokens, choose, how):
    check(world4, 1e-13, seed=seed, tokens=tokens, choose=choose, how=how, node_size=4)


@pytest.mark.parametrize("how", ["sent", "cut", "split"])
@pytest.mark.parametrize(
    ("tokens", "choose"), [([7, 12, 3, 9], "any"), ([5, 0, 9, 1], "first"), ([0, 11, 0, 0], "any")]
)
def test_two_nodes_of_two_ranks(world4, seed, tokens, choose, how):
    check(world4, 1e-13, seed=seed, tokens=tokens, choose=choose, how=how, node_size=2)


def test_nodes_of_one_rank(world2, seed):
    """Nothing is left to do inside a node."""
    check(world2, 1e-13, seed=seed, tokens=[7, 12], choose="any", how="sent", node_size=1)


def test_a_payload_in_bf16_costs_its_rounding_and_no_more(world2, seed):
    case = {"seed": seed, "tokens": [40, 30], "choose": "any", "node_size": 2, "dtype": "float32"}
    check(world2, 2e-2, how="bf16", **case)
    with pytest.raises(AssertionError, match="differs"):
        check(world2, 1e-4, how="bf16", **case)


def test_gradients_travel_encoded_as_their_direction_is(world2, seed):
    """The gradient of answers is dispatched, that of tokens is combined."""
    assert world2.run(wires_in_turn, seed=seed) == [["dispatch", "combine", "dispatch", "combine"]] * 2


def test_between_nodes_a_token_travels_once(world4, seed):
    counts = world4.run(count_rows_between_nodes, seed=seed, tokens=50)
    assert all(0 < limited < free for limited, free in counts)


def test_experts_that_cannot_be_divided_are_refused():
    mesh = Mesh(ep=Axis((0, 1, 2), 0))
    with pytest.raises(UserError, match="ep is 3, expected a divisor of the model's 8 routed experts"):
        distribute_experts(DeepSeekMoE(ModelConfig.preset("micro")), mesh)


def test_one_rank_keeps_everything():
    moe = DeepSeekMoE(ModelConfig.preset("micro"))
    before, dispatcher = moe.experts.gate_up_proj, moe.dispatcher
    distribute_experts(moe, Mesh(device=torch.device("cpu")))
    assert moe.experts.gate_up_proj is before and moe.dispatcher is dispatcher
