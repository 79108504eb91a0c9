"""The two greedy steps that every placement starts from: give heavy experts replicas, pack replicas onto GPUs.

Both are loops over experts or replicas, vectorised over rows (layers, or layers and nodes). Both break ties towards the
lower index, as the public algorithm does: the compatibility mode is built from them.

Shape suffixes: X rows, E experts, R replicas (physical slots).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


def replicate(weight_XE: Floats, num_replicas: int) -> tuple[Ints, Ints, Ints]:
    """Every expert once, then one replica more at a time for the expert whose replicas are heaviest.

    This makes the heaviest replica as light as possible.
    Returns expert_XR, copy_XR (0 for the first replica of its expert, 1, ..) and count_XE.
    """
    rows, num_experts = weight_XE.shape
    row = np.arange(rows)
    expert_XR = np.empty((rows, num_replicas), np.int64)
    expert_XR[:, :num_experts] = np.arange(num_experts)
    copy_XR = np.zeros((rows, num_replicas), np.int64)
    count_XE = np.ones((rows, num_experts), np.int64)
    load_XE = weight_XE.copy()  # of one replica
    for i in range(num_experts, num_replicas):
        heaviest = load_XE.argmax(axis=1)
        expert_XR[:, i] = heaviest
        copy_XR[:, i] = count_XE[row, heaviest]
        count_XE[row, heaviest] += 1
        load_XE[row, heaviest] = weight_XE[row, heaviest] / count_XE[row, heaviest].astype(weight_XE.dtype)
    return expert_XR, copy_XR, count_XE


def pack(load_XR: Floats, num_packs: int) -> tuple[Ints, Ints]:
    """R items into packs of equal size: the heaviest first, each into the lightest pack that still has room.

    Returns pack_XR and place_XR, the index of the item within its pack.
    """
    rows, num_items = load_XR.shape
    size = num_items // num_packs
    if size == 1:
        return np.broadcast_to(np.arange(num_items), load_XR.shape), np.zeros(load_XR.shape, np.int64)
    row = np.arange(rows)
    pack_XR, place_XR = np.empty((2, rows, num_items), np.int64)
    filled = np.zeros((rows, num_packs), np.int64)
    carried = np.zeros((rows, num_packs), load_XR.dtype)  # infinite once the pack is full
    for item in np.argsort(-load_XR, axis=1, kind="stable").T:
        lightest = carried.argmin(axis=1)
        pack_XR[row, item] = lightest
        place_XR[row, item] = filled[row, lightest]
        filled[row, lightest] += 1
        carried[row, lightest] += np.where(filled[row, lightest] < size, load_XR[row, item], np.inf)
    return pack_XR, place_XR


def count_replicas(expert_XR: Ints, num_experts: int) -> Ints:
    """Replicas of each expert, count_XE."""
    rows = len(expert_XR)
    flat = expert_XR + num_experts * np.arange(rows)[:, None]
    return np.bincount(flat.ravel(), minlength=rows * num_experts).reshape(rows, num_experts)
