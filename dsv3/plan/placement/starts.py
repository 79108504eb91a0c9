"""Placements to start a search from, beside the public algorithm's. They need not be good, only near something good.

Shape suffixes: L layers, E experts, D GPUs, N nodes, R replicas (slots); X = L x N.
"""

from __future__ import annotations

import numpy as np

from dsv3.plan.placement.cluster import Cluster
from dsv3.plan.placement.packing import Floats, Ints, count_replicas, pack, replicate


def contiguous(weight_LE: Floats, cluster: Cluster) -> Ints:
    """Replicas sorted by expert, cut into nodes and packed onto the GPUs of each: a group lies on few nodes, even where
    groups do not divide among the nodes."""
    layers = len(weight_LE)
    expert_LR, _, count_LE = replicate(weight_LE, cluster.num_replicas)
    expert_XR = np.sort(expert_LR, axis=1).reshape(layers * cluster.num_nodes, -1)
    load_XE = np.repeat(weight_LE / count_LE, cluster.num_nodes, axis=0)
    gpu_XR, place_XR = pack(np.take_along_axis(load_XE, expert_XR, axis=1), cluster.gpus_per_node)
    by_slot_XR = np.argsort(gpu_XR * cluster.slots_per_gpu + place_XR, axis=1)
    return np.take_along_axis(expert_XR, by_slot_XR, axis=1).reshape(layers, -1)


def recounted(current_LR: Ints, weight_LE: Floats, cluster: Cluster) -> Ints:
    """`current_LR` with as few slots overwritten as give every expert the replicas that its load now asks for.

    The experts with the heaviest replicas choose first: the surplus replica without which a GPU is lightest.
    """
    expert_LR = current_LR.copy()
    num_experts = weight_LE.shape[1]
    _, _, wanted_LE = replicate(weight_LE, cluster.num_replicas)
    surplus_LE = count_replicas(expert_LR, num_experts) - wanted_LE
    load_LE = weight_LE / wanted_LE
    for layer, expert_R in enumerate(expert_LR):
        surplus_E, load_E = surplus_LE[layer], load_LE[layer]
        lacking = np.repeat(np.arange(num_experts), np.maximum(-surplus_E, 0))
        for expert in lacking[np.argsort(-load_E[lacking], kind="stable")]:
            load_R = load_E[expert_R]
            rest_R = load_R.reshape(cluster.num_gpus, -1).sum(axis=1)[cluster.gpu_of_slot] - load_R
            has_it_D = (expert_R == expert).reshape(cluster.num_gpus, -1).any(axis=1)
            slot = np.where((surplus_E[expert_R] > 0) & ~has_it_D[cluster.gpu_of_slot], rest_R, np.inf).argmin()
            if surplus_E[expert_R[slot]] > 0:
                surplus_E[expert_R[slot]] -= 1
                surplus_E[expert] += 1
                expert_R[slot] = expert
    return expert_LR


def kicked(expert_LR: Ints, num_experts: int, cluster: Cluster, random: np.random.Generator) -> Ints:
    """`expert_LR` (no expert twice on a GPU) with two slots a layer overwritten and two pairs swapped at random, where
    that is allowed: out of the hollow that a search ended in, into the neighbourhood."""
    expert_LR = expert_LR.copy()
    gpu_R = cluster.gpu_of_slot
    for expert_R in expert_LR:
        count_E = np.bincount(expert_R, minlength=num_experts)
        for _ in range(2):
            if len(spare := np.flatnonzero(count_E[expert_R] > 1)):
                slot = random.choice(spare)
                absent = np.setdiff1d(np.arange(num_experts), expert_R[gpu_R == gpu_R[slot]])
                if len(absent):
                    count_E[expert_R[slot]] -= 1
                    expert_R[slot] = random.choice(absent)
                    count_E[expert_R[slot]] += 1
        for _ in range(2):
            one, other = random.integers(cluster.num_replicas, size=2)
            fits = expert_R[one] not in expert_R[gpu_R == gpu_R[other]]
            if fits and expert_R[other] not in expert_R[gpu_R == gpu_R[one]]:
                expert_R[one], expert_R[other] = expert_R[other], expert_R[one]
    return expert_LR
