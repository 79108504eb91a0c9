"""Where replicas of experts go so that the busiest GPU carries as little as possible: the default placement.

Greedy placements are good starts and poor ends. This one searches on from several (`dsv3.plan.placement.search`) and
takes, layer by layer, the cheapest of what it met: imbalance, traffic between nodes and moves from the current
placement are weighed against each other. Two promises hold on any loads: no GPU is busier than the public algorithm's
busiest, and no GPU holds an expert twice unless it has more slots than there are experts.

Shape suffixes: L layers, E experts, D GPUs, N nodes, R replicas (slots).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dsv3.errors import UserError
from dsv3.plan.placement.cluster import Cluster, check_loads
from dsv3.plan.placement.eplb import rebalance_experts, slots_of_experts
from dsv3.plan.placement.packing import Floats, Ints, count_replicas, replicate
from dsv3.plan.placement.repair import drop_duplicates, find_duplicates, keep_slots, merge_duplicates
from dsv3.plan.placement.search import Objective, improve
from dsv3.plan.placement.starts import contiguous, kicked, recounted
from dsv3.plan.placement.traffic import traffic_of

_UNEVEN = 0.01  # above what is possible at best: a layer further off is searched again
_KICKS = 16  # tries for a layer, at most;
_KICKED_SLOTS = 75_000  # and for all layers with all their slots: this bounds the time


@dataclass(frozen=True, eq=False)
class Placement:
    """Which expert each slot holds, and which part of the expert's tokens it takes.

    `physical_to_logical` [L, R]: the expert in each slot; slots count on over GPUs, GPUs over nodes.
    `share` [L, R] float64: the part of its expert's tokens that goes to this slot; those of an expert sum to 1.
    `replica_count` [L, E]; `logical_to_physical` [L, E, most replicas]: the slots of each expert, -1 beyond the last.
    `notes`: what could not be done, in words.
    """

    cluster: Cluster
    physical_to_logical: Ints
    share: Floats
    replica_count: Ints
    logical_to_physical: Ints
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        physical_to_logical: Ints,
        num_experts: int,
        cluster: Cluster,
        share: Floats | None = None,
        notes: tuple[str, ...] = (),
    ) -> Placement:
        """From the slots alone; without `share`, replicas of an expert share its tokens evenly."""
        count_LE = count_replicas(physical_to_logical, num_experts)
        if share is None:
            share = 1 / np.take_along_axis(count_LE, physical_to_logical, axis=1)
        order_LR = np.argsort(physical_to_logical, axis=1, kind="stable")
        first_LE = np.cumsum(count_LE, axis=1) - count_LE
        copy_LR = np.empty_like(physical_to_logical)
        sorted_LR = np.take_along_axis(physical_to_logical, order_LR, axis=1)
        nth_LR = np.arange(cluster.num_replicas) - np.take_along_axis(first_LE, sorted_LR, axis=1)
        np.put_along_axis(copy_LR, order_LR, nth_LR, axis=1)
        slots = slots_of_experts(physical_to_logical, copy_LR, count_LE)
        return cls(cluster, physical_to_logical, share, count_LE, slots, notes)

    def replica_load(self, weight: ArrayLike) -> Floats:
        """Load of each slot [L, R] under the experts' loads `weight` [L, E]."""
        return self.share * np.take_along_axis(np.asarray(weight, np.float64), self.physical_to_logical, axis=1)

    def gpu_load(self, weight: ArrayLike) -> Floats:
        """Load of each GPU [L, D]."""
        return self.replica_load(weight).reshape(len(self.share), self.cluster.num_gpus, -1).sum(axis=2)

    def imbalance(self, weight: ArrayLike) -> Floats:
        """Load of the busiest GPU over the mean [L]: 1 is even; 1 too for a layer without load."""
        load_LD = self.gpu_load(weight)
        mean_L = load_LD.mean(axis=1)
        return np.where(mean_L > 0, load_LD.max(axis=1), 1) / np.where(mean_L > 0, mean_L, 1)

    def nodes_per_visit(self, weight: ArrayLike) -> Floats:
        """Nodes that a token is sent to per group of experts it visits [L] (see `dsv3.plan.placement.traffic`)."""
        load_LR, num_experts = self.replica_load(weight), self.replica_count.shape[1]
        return traffic_of(self.physical_to_logical, load_LR, num_experts, self.cluster).nodes_per_visit_A

    def duplicates(self) -> Ints:
        """Slots [L] whose expert is on the same GPU already."""
        return find_duplicates(self.physical_to_logical, self.cluster).sum(axis=1)

    def moves_from(self, current: ArrayLike) -> Ints:
        """Replicas [L] that a GPU must load, because `current` (a physical_to_logical) does not hold them there."""
        kept = keep_slots(self.physical_to_logical, np.asarray(current, np.int64), self.cluster)
        return (kept != np.asarray(current)).sum(axis=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for `json.dumps`."""
        return {
            **asdict(self.cluster),
            "physical_to_logical": self.physical_to_logical.tolist(),
            "logical_to_physical": self.logical_to_physical.tolist(),
            "replica_count": self.replica_count.tolist(),
            "share": self.share.tolist(),
            "notes": list(self.notes),
        }


def place_experts(
    weight: ArrayLike,
    *,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    current: ArrayLike | None = None,
    traffic_weight: float = 0.1,
    move_weight: float = 0.05,
) -> Placement:
    """Places replicas of experts with the loads `weight` [layers, experts] on the GPUs; every layer by itself.

    A layer's cost is busiest GPU / mean + `traffic_weight` x (nodes per visit - 1) + `move_weight` x (share of the
    replicas that move from `current`, a physical_to_logical). By default ten percent more nodes reached weigh as much
    as one percent more on the busiest GPU, and moving everything as much as five.

    Replicas share their expert's tokens evenly wherever the search can keep the promises (see the module) so; in the
    few layers where it cannot, `share` is uneven and `notes` says so. Raises `UserError` on bad loads or numbers.
    """
    cluster = Cluster(num_replicas, num_groups, num_nodes, num_gpus)
    weight_LE = check_loads(weight, cluster)
    num_experts = weight_LE.shape[1]
    current_LR = None if current is None else _check_current(current, weight_LE.shape, cluster)
    for name, value in (("traffic_weight", traffic_weight), ("move_weight", move_weight)):
        if not 0 <= value < np.inf:
            raise UserError(f"{name} is {value}, expected a finite number of at least 0")

    public_LR, _, _ = rebalance_experts(weight_LE, num_replicas, num_groups, num_nodes, num_gpus)
    if cluster.slots_per_gpu > num_experts:
        note = (
            f"a GPU has {cluster.slots_per_gpu} slots for {num_experts} experts, so some hold an expert twice; "
            f"{num_experts * num_gpus} replicas would do"
        )
        return Placement.of(public_LR, num_experts, cluster, notes=(note,))
    bar_L = Placement.of(public_LR, num_experts, cluster).gpu_load(weight_LE).max(axis=1) * (1 + 1e-12)
    best_LR = _search_from_starts(
        public_LR, current_LR, weight_LE, cluster, Objective(bar_L, traffic_weight, move_weight)
    )

    placement = Placement.of(best_LR, num_experts, cluster)
    busier = np.flatnonzero(placement.gpu_load(weight_LE).max(axis=1) > bar_L)
    if not len(busier):
        return placement
    share_LR = placement.share
    for layer in busier:
        best_LR[layer], share_LR[layer] = merge_duplicates(public_LR[layer], weight_LE[layer], cluster)
    note = (
        f"in {len(busier)} of {len(weight_LE)} layers replicas take uneven shares of their expert's tokens: shared "
        "evenly, the busiest GPU would carry more than the public algorithm's, which holds an expert twice"
    )
    return Placement.of(best_LR, num_experts, cluster, share_LR, (note,))


def _search_from_starts(
    public_LR: Ints, current_LR: Ints | None, weight_LE: Floats, cluster: Cluster, objective: Objective
) -> Ints:
    """The cheapest placement of each layer that searches from the current and from greedy placements meet."""
    num_experts = weight_LE.shape[1]
    best_LR, best_cost_L = public_LR.copy(), np.full(len(weight_LE), np.inf)

    def search(layers: Ints, start_LR: Ints) -> None:
        start_LR = drop_duplicates(start_LR, weight_LE[layers], cluster)
        near_LR = None if current_LR is None else current_LR[layers]
        if near_LR is not None:
            start_LR = keep_slots(start_LR, near_LR, cluster)
        found_LR, cost_L = improve(start_LR, weight_LE[layers], cluster, objective.of(layers), near_LR)
        cheaper = cost_L < best_cost_L[layers]
        best_LR[layers[cheaper]], best_cost_L[layers[cheaper]] = found_LR[cheaper], cost_L[cheaper]

    def uneven_layers() -> Ints:
        busiest_L = Placement.of(best_LR, num_experts, cluster).gpu_load(weight_LE).max(axis=1)
        return np.flatnonzero((busiest_L > (1 + _UNEVEN) * bound_L) | (busiest_L > objective.bar_L))

    # With even shares no busiest GPU carries less than the mean, or than the heaviest replica.
    _, _, count_LE = replicate(weight_LE, cluster.num_replicas)
    bound_L = np.maximum(weight_LE.sum(axis=1) / cluster.num_gpus, (weight_LE / count_LE).max(axis=1))
    every = np.arange(len(weight_LE))
    if current_LR is not None:
        search(every, current_LR)
        search(every, recounted(current_LR, weight_LE, cluster))
    search(every, public_LR if cluster.groups_fill_nodes else contiguous(weight_LE, cluster))
    # Groups held together can stand in the way of balance: where they did, search from a start that ignores them, and
    # last from what has been found with a little disorder brought in.
    if len(uneven := uneven_layers()):
        flat_LR, _, _ = rebalance_experts(weight_LE[uneven], cluster.num_replicas, 1, 1, cluster.num_gpus)
        search(uneven, flat_LR)
    random = np.random.default_rng(0)
    kicked_slots = kicks = 0
    while len(uneven := uneven_layers()) and kicks < _KICKS and kicked_slots < _KICKED_SLOTS:
        search(uneven, kicked(best_LR[uneven], num_experts, cluster, random))
        kicks, kicked_slots = kicks + 1, kicked_slots + uneven.size * cluster.num_replicas
    return best_LR


def _check_current(current: ArrayLike, shape: tuple[int, ...], cluster: Cluster) -> Ints:
    layers, num_experts = shape
    current_LR = np.asarray(current)
    expected = (layers, cluster.num_replicas)
    if current_LR.shape != expected or current_LR.dtype.kind not in "iu":
        raise UserError(
            f"the current placement is {current_LR.dtype} of shape {current_LR.shape}, expected the expert of each "
            f"slot: integers of shape {expected} (layers, replicas)"
        )
    if current_LR.min() < 0 or current_LR.max() >= num_experts:
        raise UserError(f"the current placement names experts outside 0 to {num_experts - 1}")
    missing = np.argwhere(count_replicas(current_LR.astype(np.int64), num_experts) == 0)
    if len(missing):
        raise UserError(
            f"the current placement lacks expert {missing[0][1]} in layer {missing[0][0]}; place from scratch"
        )
    return current_LR.astype(np.int64)
