"""What refreshing the placement would have gained: recorded loads, placed again and again.

The first window of records is only looked at: no policy is judged on it. After it,
- never: the placement made from the first window stays;
- refreshed: every `every` records a placement from the mean of the last window replaces it, and stays near it;
- oracle: every record has the placement made from its own loads, which nobody can know in time. It is a reference, not
  a limit: a placement near the current one can by luck fit a record better.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dsv3.errors import UserError
from dsv3.plan.placement.cluster import Cluster, check_loads
from dsv3.plan.placement.place import place_experts


def replay(
    loads_over_time: ArrayLike, *, every: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> dict[str, Any]:
    """Imbalance (busiest GPU over the mean) under each policy, from loads [records, layers, experts]; JSON-able.

    For each of "never", "refreshed" and "oracle": "mean" over records and layers, "worst" of all, "by_record" (mean
    over layers). "moved" counts the replicas that refreshing loads in all, "refreshes" how often. Raises `UserError` if
    there are not more than `every` records, or on bad loads or numbers.
    """
    loads = np.asarray(loads_over_time, np.float64)
    cluster = Cluster(num_replicas, num_groups, num_nodes, num_gpus)
    if loads.ndim != 3:
        raise UserError(f"loads over time have the shape {loads.shape}, expected [records, layers, experts]")
    if not 1 <= every < len(loads):
        raise UserError(f"every is {every}, expected 1 to {len(loads) - 1}: less than the {len(loads)} records")
    for record in loads:
        check_loads(record, cluster)
    shape = {"num_replicas": num_replicas, "num_groups": num_groups, "num_nodes": num_nodes, "num_gpus": num_gpus}
    first = refreshed = place_experts(loads[:every].mean(axis=0), **shape)
    imbalance: dict[str, list[np.ndarray]] = {"never": [], "refreshed": [], "oracle": []}
    moved = refreshes = 0
    for i in range(every, len(loads)):
        if i > every and i % every == 0:
            current = refreshed.physical_to_logical
            refreshed = place_experts(loads[i - every : i].mean(axis=0), current=current, **shape)
            moved += int(refreshed.moves_from(current).sum())
            refreshes += 1
        imbalance["never"].append(first.imbalance(loads[i]))
        imbalance["refreshed"].append(refreshed.imbalance(loads[i]))
        imbalance["oracle"].append(place_experts(loads[i], **shape).imbalance(loads[i]))
    return {
        "every": every,
        "records": len(loads) - every,
        "refreshes": refreshes,
        "moved": moved,
        **{policy: _summary(np.stack(values)) for policy, values in imbalance.items()},
    }


def _summary(imbalance_by_record: np.ndarray) -> dict[str, Any]:
    return {
        "mean": float(imbalance_by_record.mean()),
        "worst": float(imbalance_by_record.max()),
        "by_record": imbalance_by_record.mean(axis=1).tolist(),
    }
