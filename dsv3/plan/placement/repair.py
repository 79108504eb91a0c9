"""Two replicas of one expert on one GPU: finding them and doing without them.

The second replica takes a slot and relieves nobody. As long as a GPU has no more slots than there are experts, another
expert can always take its place.

Shape suffixes: L layers, E experts, D GPUs, R replicas, S slots of a GPU.
"""

from __future__ import annotations

import numpy as np

from dsv3.plan.placement.cluster import Cluster
from dsv3.plan.placement.packing import Floats, Ints, Mask


def find_duplicates(expert_LR: Ints, cluster: Cluster) -> Mask:
    """[L, R]: whether an earlier slot of the same GPU holds the same expert."""
    expert_LDS = expert_LR.reshape(len(expert_LR), cluster.num_gpus, cluster.slots_per_gpu)
    order_LDS = np.argsort(expert_LDS, axis=2, kind="stable")
    sorted_LDS = np.take_along_axis(expert_LDS, order_LDS, axis=2)
    repeats_LDS = np.zeros(expert_LDS.shape, bool)
    np.put_along_axis(repeats_LDS, order_LDS[..., 1:], sorted_LDS[..., 1:] == sorted_LDS[..., :-1], axis=2)
    return repeats_LDS.reshape(expert_LR.shape)


def drop_duplicates(expert_LR: Ints, weight_LE: Floats, cluster: Cluster) -> Ints:
    """The placement without duplicates, counting on replicas that share their expert's tokens evenly.

    A duplicate is swapped with the replica elsewhere that leaves the two GPUs least busy, if that makes no GPU the
    busiest; otherwise the expert with the heaviest replicas that is not on its GPU takes its slot. Both stay within the
    node if they can, so that groups do.
    """
    expert_LR = expert_LR.copy()
    gpu_R, node_R = cluster.gpu_of_slot, cluster.node_of_slot
    for layer in np.flatnonzero(find_duplicates(expert_LR, cluster).any(axis=1)):
        expert_R, weight_E = expert_LR[layer], weight_LE[layer]
        count_E = np.bincount(expert_R, minlength=len(weight_E))
        while len(duplicates := np.flatnonzero(find_duplicates(expert_R[None], cluster)[0])):
            slot = duplicates[0]
            absent_E, same_node_R = _absent(slot, expert_R, len(weight_E), cluster), node_R == node_R[slot]
            load_R = (weight_E / count_E)[expert_R]
            load_D = load_R.reshape(cluster.num_gpus, -1).sum(axis=1)
            has_it_D = (expert_R == expert_R[slot]).reshape(cluster.num_gpus, -1).any(axis=1)
            lighter_R = load_R[slot] - load_R
            busier_R = np.maximum(load_D[gpu_R[slot]] - lighter_R, load_D[gpu_R] + lighter_R)
            fits_R = absent_E[expert_R] & ~has_it_D[gpu_R] & (busier_R <= load_D.max())
            if fits_R.any():
                other = np.where(_narrow(fits_R, same_node_R), busier_R, np.inf).argmin()
                expert_R[slot], expert_R[other] = expert_R[other], expert_R[slot]
            else:
                on_node_E = np.isin(np.arange(len(weight_E)), expert_R[same_node_R])
                count_E[expert_R[slot]] -= 1
                expert_R[slot] = np.where(_narrow(absent_E, on_node_E), weight_E / count_E, -1).argmax()
                count_E[expert_R[slot]] += 1
    return expert_LR


def merge_duplicates(expert_R: Ints, weight_E: Floats, cluster: Cluster) -> tuple[Ints, Floats]:
    """One layer without duplicates and with no GPU busier than before, at the price of uneven shares.

    The first of two replicas on a GPU takes over the share of the second, whose slot goes to an expert of the busiest
    GPU that is not on this one, with a share that evens the two GPUs out. Returns expert_R and share_R, the part of its
    expert's tokens that a slot takes.
    """
    expert_R = expert_R.copy()
    share_R = 1 / np.bincount(expert_R, minlength=len(weight_E))[expert_R]
    duplicates = np.flatnonzero(find_duplicates(expert_R[None], cluster)[0])
    gpu_R = cluster.gpu_of_slot
    for slot in duplicates:
        first = np.flatnonzero((gpu_R == gpu_R[slot]) & (expert_R == expert_R[slot]))[0]
        share_R[first] += share_R[slot]
        share_R[slot] = 0
    for slot in duplicates:
        load_R = share_R * weight_E[expert_R]
        load_D = load_R.reshape(cluster.num_gpus, -1).sum(axis=1)
        # The replica to relieve: on the busiest GPU that has one to spare for this slot, the one that carries most.
        fits_R = _absent(slot, expert_R, len(weight_E), cluster)[expert_R]
        busy_R = np.where(fits_R, load_D[gpu_R], -1)
        relieved = np.where(busy_R == busy_R.max(), load_R, -1).argmax()
        moved = np.clip((load_D[gpu_R[relieved]] - load_D[gpu_R[slot]]) / 2, 0, load_R[relieved])
        expert_R[slot] = expert_R[relieved]
        share_R[slot] = moved / max(weight_E[expert_R[slot]], np.finfo(float).tiny)
        share_R[relieved] -= share_R[slot]
    return expert_R, share_R


def keep_slots(expert_LR: Ints, current_LR: Ints, cluster: Cluster) -> Ints:
    """The same experts on every GPU, each that is there in `current_LR` in the slot it has there."""
    shape = (len(expert_LR), cluster.num_gpus, cluster.slots_per_gpu)
    new_LDS, current_LDS = expert_LR.reshape(shape), current_LR.reshape(shape)
    same_LDSS = new_LDS[..., :, None] == current_LDS[..., None, :]
    stays_LDS = same_LDSS.any(axis=3)
    target_LDS = np.where(stays_LDS, same_LDSS.argmax(axis=3), -1)
    taken_LDS = (target_LDS[..., :, None] == np.arange(shape[2])).any(axis=2)
    # The n-th expert that comes takes the n-th slot that is free.
    comes, free = np.argsort(stays_LDS, axis=2, kind="stable"), np.argsort(taken_LDS, axis=2, kind="stable")
    coming = np.take_along_axis(~stays_LDS, comes, axis=2)
    np.put_along_axis(target_LDS, comes, np.where(coming, free, np.take_along_axis(target_LDS, comes, axis=2)), axis=2)
    kept_LDS = np.empty_like(new_LDS)
    np.put_along_axis(kept_LDS, target_LDS, new_LDS, axis=2)
    return kept_LDS.reshape(expert_LR.shape)


def _absent(slot: np.integer, expert_R: Ints, num_experts: int, cluster: Cluster) -> Mask:
    """[E]: which experts are not on the GPU of `slot`."""
    absent_E = np.ones(num_experts, bool)
    absent_E[expert_R[cluster.gpu_of_slot == cluster.gpu_of_slot[slot]]] = False
    return absent_E


def _narrow(allowed: Mask, preferred: Mask) -> Mask:
    """What is allowed and preferred, or if that is nothing, what is allowed."""
    both = allowed & preferred
    return both if both.any() else allowed
