"""The compatibility mode: the published example, and a plain re-telling of the public algorithm, expert by expert."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.plan.placement import rebalance_experts

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens" / "eplb_readme.json").read_text())
SHAPE = {name: GOLDEN[name] for name in ("num_replicas", "num_groups", "num_nodes", "num_gpus")}


def told_plainly(weight: np.ndarray, replicas: int, groups: int, nodes: int, gpus: int) -> list[list[int]]:
    """The expert in each slot, for one layer."""
    if groups % nodes:
        groups = nodes = 1
    loads = [np.float32(value) for value in weight]
    size = len(loads) // groups
    group_loads = [np.sum(np.array(loads[g * size : (g + 1) * size])) for g in range(groups)]
    slots: list[int] = []
    for node_groups in deal(group_loads, nodes):
        experts = [g * size + i for g in node_groups for i in range(size)]
        copies = dict.fromkeys(experts, 1)
        items = list(experts)
        while len(items) < replicas // nodes:
            heaviest = max(experts, key=lambda expert: loads[expert] / np.float32(copies[expert]))
            copies[heaviest] += 1
            items.append(heaviest)
        item_loads = [loads[expert] / np.float32(copies[expert]) for expert in items]
        slots += [items[i] for pack in deal(item_loads, gpus // nodes) for i in pack]
    return slots


def deal(loads: list[np.float32], packs: int) -> list[list[int]]:
    size = len(loads) // packs
    if size == 1:
        return [[i] for i in range(packs)]
    held: list[list[int]] = [[] for _ in range(packs)]
    total = [np.float32(0)] * packs
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        pack = min((p for p in range(packs) if len(held[p]) < size), key=lambda p: total[p])
        held[pack].append(item)
        total[pack] += loads[item]
    return held


def test_published_example_exactly() -> None:
    slots, slots_of, counts = rebalance_experts(GOLDEN["weight"], **SHAPE)
    assert slots.tolist() == GOLDEN["phy2log"]
    assert slots_of.tolist() == GOLDEN["log2phy"]
    assert counts.tolist() == GOLDEN["logcnt"]
    load = np.take_along_axis(np.array(GOLDEN["weight"]) / counts, slots, axis=1).reshape(2, 8, 2).sum(axis=2)
    assert (load.max(axis=1) / load.mean(axis=1)).tolist() == pytest.approx(GOLDEN["max_over_mean"])


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int, int]:
    nodes = draw(st.integers(1, 3))
    gpus = nodes * draw(st.integers(1, 4))
    replicas = gpus * draw(st.integers(1, 5))
    groups = draw(st.integers(1, 6))
    sizes = [n for n in range(groups, replicas + 1, groups) if groups % nodes or n % nodes == 0]
    if not sizes:
        groups, sizes = 1, [replicas]
    experts, layers = draw(st.sampled_from(sizes)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["uniform", "heavy", "ties"]))
    weight = {
        "uniform": lambda: rng.random((layers, experts)),
        "heavy": lambda: rng.pareto(1, (layers, experts)),
        "ties": lambda: rng.integers(0, 4, (layers, experts)).astype(float),
    }[kind]()
    return weight, replicas, groups, nodes, gpus


@given(problems())
@settings(max_examples=150)
def test_same_as_the_algorithm_told_plainly(problem: tuple[np.ndarray, int, int, int, int]) -> None:
    weight, replicas, *rest = problem
    slots, slots_of, counts = rebalance_experts(weight, replicas, *rest)
    assert slots.tolist() == [told_plainly(layer, replicas, *rest) for layer in weight]
    for layer, expert in np.ndindex(*counts.shape):
        held = slots_of[layer, expert]
        assert sorted(held[held >= 0]) == np.flatnonzero(slots[layer] == expert).tolist()
        assert (held >= 0).sum() == counts[layer, expert] and (held[: counts[layer, expert]] >= 0).all()


def test_takes_tensors_and_lists() -> None:
    weight = torch.tensor(GOLDEN["weight"])
    for one, other in zip(
        rebalance_experts(weight, **SHAPE), rebalance_experts(GOLDEN["weight"], **SHAPE), strict=True
    ):
        assert np.array_equal(one, other) and one.dtype == np.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_gpus": 7}, r"num_gpus is 7, expected a multiple of num_nodes \(2\): 6 or 8 would work"),
        ({"num_replicas": 17}, r"num_replicas is 17, expected a multiple of num_gpus \(8\): 16 or 24 would work"),
        ({"num_replicas": 8}, "at least one for each of the 12 experts: 16 would work on 8 GPUs"),
        ({"num_groups": 5}, r"num_groups is 5, expected a divisor of the 12 experts: one of \[1, 2, 3, 4, 6, 12\]"),
        ({"num_nodes": 0}, "num_nodes is 0, expected a whole number of at least 1"),
        ({"num_gpus": 8.0}, "num_gpus is 8.0, expected a whole number"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_what_would_work(change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rebalance_experts(GOLDEN["weight"], **{**SHAPE, **change})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "the load of expert 3 in layer 1 is nan"),
        (float("inf"), "the load of expert 3 in layer 1 is inf"),
        (-1.0, "the load of expert 3 in layer 1 is -1.0"),
    ],
)
def test_bad_loads_are_refused(value: float, message: str) -> None:
    weight = np.array(GOLDEN["weight"], float)
    weight[1, 3] = value
    with pytest.raises(UserError, match=message):
        rebalance_experts(weight, **SHAPE)


@pytest.mark.parametrize("weight", [[1.0, 2.0], [[1, 2], [3]], [["a", "b"]], np.ones((2, 3, 4)), np.ones((0, 4))])
def test_what_is_no_matrix_is_refused(weight: object) -> None:
    with pytest.raises(UserError, match="expert loads"):
        rebalance_experts(weight, 8, 1, 1, 4)  # type: ignore[arg-type]
