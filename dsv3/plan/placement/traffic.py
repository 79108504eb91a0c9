"""How many nodes a token must be sent to: what spreading a group of experts over nodes costs the network.

Node-limited routing picks groups of experts first (V3: 4 of 8), then experts within them (8 in all, about 2 a group). A
token is sent to a node once, however many of its experts live there. If a group's load lies on the nodes in shares p_n,
a visit that picks m of its experts independently by load reaches sum_n (1 - (1 - p_n)^m) nodes: 1 if the whole group
is on one node, at most m. This knows nothing about which experts are picked together, only their loads.

Shape suffixes: A layers, E experts, R replicas, G groups of experts, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv3.plan.placement.cluster import Cluster
from dsv3.plan.placement.packing import Floats, Ints

EXPERTS_PER_VISIT = 2  # of DeepSeek-V3: num_experts_per_tok / topk_group


@dataclass(frozen=True)
class Traffic:
    """Where the load of every group lies: `share_AGN`, and `load_A` of all groups together."""

    share_AGN: Floats
    load_A: Floats
    nodes_per_visit_A: Floats
    group_size: int

    def slope(self, row: Ints, expert: Ints, node: Ints) -> Floats:
        """What one more unit of load of `expert` on `node` adds to nodes_per_visit; arguments broadcast."""
        share = self.share_AGN[row, expert // self.group_size, node]
        return EXPERTS_PER_VISIT * (1 - share) ** (EXPERTS_PER_VISIT - 1) / self.load_A[row]


def traffic_of(expert_AR: Ints, load_AR: Floats, num_experts: int, cluster: Cluster) -> Traffic:
    """Traffic of replicas of `expert_AR` that carry `load_AR`; a layer without load counts as one node per visit."""
    layers = len(expert_AR)
    group_size = num_experts // cluster.num_groups
    shape = (layers, cluster.num_groups, cluster.num_nodes)
    cell_AR = np.ravel_multi_index((np.arange(layers)[:, None], expert_AR // group_size, cluster.node_of_slot), shape)
    load_AGN = np.bincount(cell_AR.ravel(), load_AR.ravel(), minlength=np.prod(shape)).reshape(shape)
    load_AG = load_AGN.sum(axis=2)
    load_A = load_AG.sum(axis=1)
    share_AGN = load_AGN / np.where(load_AG > 0, load_AG, 1)[:, :, None]
    visits_AG = (1 - (1 - share_AGN) ** EXPERTS_PER_VISIT).sum(axis=2)
    nodes_per_visit_A = np.where(load_A > 0, (visits_AG * load_AG).sum(axis=1), 1) / np.where(load_A > 0, load_A, 1)
    return Traffic(share_AGN, np.where(load_A > 0, load_A, 1), nodes_per_visit_A, group_size)
