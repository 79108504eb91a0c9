"""The public expert placement algorithm (EPLB), result for result: the mode to be compatible with, and the bar to beat.

It packs greedily once and never looks back, and at times puts two replicas of one expert on one GPU, where the second
helps nobody. `dsv3.plan.placement.place_experts` starts from its placements and goes on.

Equal loads are taken in the order of their index; the public code leaves their order to its sort, so which replica of
an expert is called the first can differ between machines there.

Shape suffixes: L layers, E logical experts, R replicas (physical slots), G groups of experts, N nodes; X = L x N.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dsv3.plan.placement.cluster import Cluster, check_loads
from dsv3.plan.placement.packing import Floats, Ints, pack, replicate


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Ints, Ints, Ints]:
    """Places `num_replicas` replicas of experts with the loads `weight` [layers, experts] as the public EPLB does.

    Where the groups divide among the nodes, whole groups go to nodes first and replicas are made within the node;
    otherwise groups and nodes are ignored. Rounding (float32) is the public algorithm's too.

    Returns physical_to_logical [L, R], the expert in each slot (slot r is on GPU r // (R / num_gpus));
    logical_to_physical [L, E, most replicas], the slots of each expert, -1 beyond the last; replica_count [L, E].
    Raises `UserError` if loads are not finite and non-negative or the numbers do not divide.
    """
    cluster = Cluster(num_replicas, num_groups, num_nodes, num_gpus)
    weight_LE = check_loads(weight, cluster)
    if not cluster.groups_fill_nodes:
        cluster = cluster.flat
    expert_LR, copy_LR, count_LE = pack_groups_first(weight_LE.astype(np.float32), cluster)
    return expert_LR, slots_of_experts(expert_LR, copy_LR, count_LE), count_LE


def pack_groups_first(weight_LE: Floats, cluster: Cluster) -> tuple[Ints, Ints, Ints]:
    """Groups to nodes, replicas within the node, replicas to its GPUs.

    Returns expert_LR, copy_LR (which replica of its expert a slot holds: 0, 1, ..) and count_LE.
    """
    layers, num_experts = weight_LE.shape
    groups, nodes, gpus = cluster.num_groups, cluster.num_nodes, cluster.gpus_per_node
    per_group, per_node = num_experts // groups, num_experts // nodes
    # Groups to nodes: a new order of the experts, in which those of a node follow each other.
    node_LG, place_LG = pack(weight_LE.reshape(layers, groups, per_group).sum(axis=2), nodes)
    group_order_LG = np.argsort(node_LG * (groups // nodes) + place_LG, axis=1)
    order_LE = (group_order_LG[:, :, None] * per_group + np.arange(per_group)).reshape(layers, num_experts)
    weight_XE = np.take_along_axis(weight_LE, order_LE, axis=1).reshape(layers * nodes, per_node)
    # Within each node, as if there were no other.
    expert_XR, copy_XR, count_XE = replicate(weight_XE, cluster.num_replicas // nodes)
    load_XR = np.take_along_axis(weight_XE / count_XE.astype(weight_XE.dtype), expert_XR, axis=1)
    gpu_XR, place_XR = pack(load_XR, gpus)
    by_slot_XR = np.argsort(gpu_XR * cluster.slots_per_gpu + place_XR, axis=1)
    # Back to the names that the experts have in the whole model.
    in_node_XR = np.take_along_axis(expert_XR, by_slot_XR, axis=1)
    in_order_LR = (in_node_XR.reshape(layers, nodes, -1) + per_node * np.arange(nodes)[:, None]).reshape(layers, -1)
    expert_LR = np.take_along_axis(order_LE, in_order_LR, axis=1)
    copy_LR = np.take_along_axis(copy_XR, by_slot_XR, axis=1).reshape(layers, -1)
    count_LE = np.empty((layers, num_experts), np.int64)
    np.put_along_axis(count_LE, order_LE, count_XE.reshape(layers, num_experts), axis=1)
    return expert_LR, copy_LR, count_LE


def slots_of_experts(expert_LR: Ints, copy_LR: Ints, count_LE: Ints) -> Ints:
    """logical_to_physical [L, E, most replicas]: the slots of each expert in the order of `copy_LR`, -1 beyond."""
    layers, num_replicas = expert_LR.shape
    slots = np.full((layers, count_LE.shape[1], count_LE.max()), -1, np.int64)
    slots[np.arange(layers)[:, None], expert_LR, copy_LR] = np.arange(num_replicas)
    return slots
