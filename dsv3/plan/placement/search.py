"""Local search: relieve each layer's busiest GPU, step by step, until no step does.

A step swaps a replica on the busiest GPU with a lighter one elsewhere, or copies an expert of the busiest GPU over a
replica elsewhere whose expert has others. All replicas of an expert share its tokens evenly, so a copy relieves every
host of the one expert and burdens the remaining hosts of the other. No step puts two replicas of one expert on one GPU
or takes an expert's last replica. Every step leaves what it burdens below what the busiest GPU carried, so the search
never comes back to where it was.

The path is walked for balance; what is kept is the cheapest placement on it, with traffic and moves counted.

Shape suffixes: L layers, A layers still searched, E experts, D GPUs, R replicas; for the two ends of a step
T slots of the busiest GPU, K GPUs for the other end, S slots of such a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dsv3.plan.placement.cluster import Cluster
from dsv3.plan.placement.packing import Floats, Ints, Mask, count_replicas
from dsv3.plan.placement.traffic import Traffic, traffic_of

_MAX_STEPS = 1000
_CLOSE_ENOUGH = 1e-3  # of the mean: a layer this even is left alone
_LEAST_GAIN = 1e-6  # of the mean: what a step must gain
_PAIRS = 1000  # of slots to compare for each step, about: all where GPUs have few slots
# A step relieves one GPU, of which many may be nearly as busy, but the traffic it adds stays. So where steps are
# compared with each other, traffic counts for more than in the cost of a placement.
_STEP_TRAFFIC = 10.0
_TOO_BUSY = 1e6


@dataclass(frozen=True)
class Objective:
    """What a placement of a layer costs: imbalance + traffic + moves, and to be no busier than `bar_L` if it can be.

    Imbalance is the load of the busiest GPU over the mean. `traffic_weight` is the price of one node more that a token
    is sent to per group it visits, `move_weight` that of moving every replica.
    """

    bar_L: Floats
    traffic_weight: float
    move_weight: float

    def of(self, layers: Ints) -> Objective:
        """The objective of some of the layers."""
        return replace(self, bar_L=self.bar_L[layers])


def improve(
    expert_LR: Ints, weight_LE: Floats, cluster: Cluster, objective: Objective, current_LR: Ints | None = None
) -> tuple[Ints, Floats]:
    """The cheapest placement met on the search from `expert_LR`, and its cost, by layer.

    `expert_LR` holds every expert, none twice on a GPU. Slots that differ from `current_LR` count as moved.
    """
    layers, num_experts = weight_LE.shape
    expert_LR = expert_LR.copy()
    holds_LDE = np.zeros((layers, cluster.num_gpus, num_experts), bool)
    holds_LDE[np.arange(layers)[:, None], cluster.gpu_of_slot, expert_LR] = True
    best_LR, best_cost_L = expert_LR.copy(), np.full(layers, np.inf)
    active = np.arange(layers)
    for _ in range(_MAX_STEPS):
        view = _View.of(expert_LR[active], weight_LE[active], cluster)
        traffic = traffic_of(view.expert_AR, view.load_AR, num_experts, cluster)
        cost_A = view.busiest_A / view.mean_A + objective.traffic_weight * (traffic.nodes_per_visit_A - 1)
        cost_A += _TOO_BUSY * (view.busiest_A > objective.bar_L[active])
        if current_LR is not None:
            cost_A += objective.move_weight * (view.expert_AR != current_LR[active]).mean(axis=1)
        cheaper = cost_A < best_cost_L[active]
        best_LR[active[cheaper]], best_cost_L[active[cheaper]] = view.expert_AR[cheaper], cost_A[cheaper]
        step = _best_step(view, holds_LDE[active], cluster, traffic, objective.traffic_weight)
        go_on = step.found & (view.busiest_A > (1 + _CLOSE_ENOUGH) * view.mean_A)
        if not go_on.any():
            break
        active = active[go_on]
        step.make(go_on, active, expert_LR, holds_LDE, cluster)
    return best_LR, best_cost_L


@dataclass(frozen=True)
class _View:
    """What replicas and GPUs carry in the layers still searched."""

    expert_AR: Ints
    count_AR: Ints
    load_AR: Floats
    gpu_load_AD: Floats
    mean_A: Floats
    busiest_gpu_A: Ints
    busiest_A: Floats

    @classmethod
    def of(cls, expert_AR: Ints, weight_AE: Floats, cluster: Cluster) -> _View:
        count_AR = np.take_along_axis(count_replicas(expert_AR, weight_AE.shape[1]), expert_AR, axis=1)
        load_AR = np.take_along_axis(weight_AE, expert_AR, axis=1) / count_AR
        gpu_load_AD = load_AR.reshape(len(load_AR), cluster.num_gpus, -1).sum(axis=2)
        return cls(
            expert_AR,
            count_AR,
            load_AR,
            gpu_load_AD,
            mean_A=np.maximum(gpu_load_AD.mean(axis=1), np.finfo(float).tiny),
            busiest_gpu_A=gpu_load_AD.argmax(axis=1),
            busiest_A=gpu_load_AD.max(axis=1),
        )


@dataclass(frozen=True)
class _Step:
    """One step for every layer of a view: which kind, and the slots at its two ends; nothing where none was `found`."""

    found: Mask
    copies: Mask
    busiest_slot: Ints
    other_slot: Ints

    def make(self, go_on: Mask, layer: Ints, expert_LR: Ints, holds_LDE: Mask, cluster: Cluster) -> None:
        """Makes the step in place, in the layers `layer`, which are those of the view where `go_on`."""
        copies, here, there = self.copies[go_on], self.busiest_slot[go_on], self.other_slot[go_on]
        here_gpu, there_gpu = cluster.gpu_of_slot[here], cluster.gpu_of_slot[there]
        mine, yours = expert_LR[layer, here], expert_LR[layer, there]
        expert_LR[layer, there] = mine
        expert_LR[layer, here] = np.where(copies, mine, yours)
        holds_LDE[layer, there_gpu, yours] = False
        holds_LDE[layer, there_gpu, mine] = True
        holds_LDE[layer, here_gpu, mine] = copies
        holds_LDE[layer, here_gpu, yours] |= ~copies


def _best_step(view: _View, holds_ADE: Mask, cluster: Cluster, traffic: Traffic, traffic_weight: float) -> _Step:
    """The step of each layer after which the GPUs it touches are least busy, allowing for traffic."""
    row = np.arange(len(view.expert_AR))
    row_1, row_11 = row[:, None], row[:, None, None]
    slots = np.arange(cluster.slots_per_gpu)
    # What a remaining host of the expert in a slot would carry if the slot were overwritten. (An upper bound: where the
    # copied expert is on that host, it is relieved too.)
    host_AE = np.zeros((len(row), holds_ADE.shape[2]))
    np.maximum.at(host_AE, (row_1, view.expert_AR), view.gpu_load_AD[:, cluster.gpu_of_slot])
    burden_AR = np.where(view.count_AR > 1, view.load_AR / np.maximum(view.count_AR - 1, 1), np.inf)
    host_AR = host_AE[row_1, view.expert_AR] + burden_AR
    end_AK = _other_ends(view.gpu_load_AD, host_AR, cluster)
    here_AT = view.busiest_gpu_A[:, None] * cluster.slots_per_gpu + slots
    there_AKS = end_AK[:, :, None] * cluster.slots_per_gpu + slots
    mine_AT, yours_AKS = view.expert_AR[row_1, here_AT], view.expert_AR[row_11, there_AKS]
    load_AT, load_AKS = view.load_AR[row_1, here_AT], view.load_AR[row_11, there_AKS]
    count_AT = view.count_AR[row_1, here_AT]
    shared_AT = load_AT * count_AT / (count_AT + 1)  # a replica of mine after a copy
    busiest_A111 = view.busiest_A[:, None, None, None]
    end_load_A1K1 = view.gpu_load_AD[row_1, end_AK][:, None, :, None]

    # How busy the busier end is after a swap.
    lighter_ATKS = load_AT[:, :, None, None] - load_AKS[:, None]
    swap_ATKS = np.maximum(busiest_A111 - lighter_ATKS, end_load_A1K1 + lighter_ATKS)
    # How busy the busier end, or a remaining host of the overwritten expert, is after a copy.
    relieved_AT11 = (view.busiest_A[:, None] - load_AT + shared_AT)[:, :, None, None]
    end_ATKS = end_load_A1K1 + shared_AT[:, :, None, None] - load_AKS[:, None]
    host_A1KS = host_AR[row_11, there_AKS][:, None]
    copy_ATKS = np.maximum(np.maximum(relieved_AT11, end_ATKS), host_A1KS)

    # Not allowed: no gain; mine is there already; for a swap, yours is here already.
    limit_A111 = (view.busiest_A - _LEAST_GAIN * view.mean_A)[:, None, None, None]
    there_ATK1 = holds_ADE[row_11, end_AK[:, None, :], mine_AT[:, :, None]][..., None]
    here_A1KS = holds_ADE[row_11, view.busiest_gpu_A[:, None, None], yours_AKS][:, None]
    swap_ATKS[(swap_ATKS >= limit_A111) | there_ATK1 | here_A1KS] = np.inf
    copy_ATKS[(copy_ATKS >= limit_A111) | there_ATK1] = np.inf

    if traffic_weight > 0 and cluster.num_nodes > 1:
        here_A11 = (view.busiest_gpu_A // cluster.gpus_per_node)[:, None, None]
        there_AK = end_AK // cluster.gpus_per_node
        mine_AT1, there_A1K, there_AK1 = mine_AT[:, :, None], there_AK[:, None, :], there_AK[:, :, None]
        mine_ATK = traffic.slope(row_11, mine_AT1, there_A1K) - traffic.slope(row_11, mine_AT1, here_A11)
        back_AKS = traffic.slope(row_11, yours_AKS, here_A11) - traffic.slope(row_11, yours_AKS, there_AK1)
        price_A11 = (_STEP_TRAFFIC * traffic_weight * view.mean_A)[:, None, None]
        swap_ATKS += (price_A11 * load_AT[:, :, None] * mine_ATK)[..., None]
        swap_ATKS += (price_A11 * load_AKS * back_AKS)[:, None]
        copy_ATKS += (price_A11 * shared_AT[:, :, None] * mine_ATK)[..., None]

    swap_AX, copy_AX = swap_ATKS.reshape(len(row), -1), copy_ATKS.reshape(len(row), -1)
    swap_A, copy_A = swap_AX.argmin(axis=1), copy_AX.argmin(axis=1)
    copies = copy_AX[row, copy_A] < swap_AX[row, swap_A]
    t, k, s = np.unravel_index(np.where(copies, copy_A, swap_A), swap_ATKS.shape[1:])
    found = np.isfinite(np.minimum(copy_AX[row, copy_A], swap_AX[row, swap_A]))
    return _Step(found, copies, here_AT[row, t], there_AKS[row, k, s])


def _other_ends(gpu_load_AD: Floats, host_AR: Floats, cluster: Cluster) -> Ints:
    """GPUs to try as a step's other end: the lightest, and those of the slots that are missed least; or simply all."""
    num_ends = max(8, _PAIRS // cluster.slots_per_gpu**2)
    if num_ends >= cluster.num_gpus:
        return np.broadcast_to(np.arange(cluster.num_gpus), gpu_load_AD.shape)
    lightest_AK = np.argpartition(gpu_load_AD, num_ends // 2, axis=1)[:, : num_ends // 2]
    missed_least_AK = np.argpartition(host_AR, num_ends // 2, axis=1)[:, : num_ends // 2]
    return np.concatenate([lightest_AK, cluster.gpu_of_slot[missed_least_AK]], axis=1)
