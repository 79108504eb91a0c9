"""Expert placement: which replica of which expert on which GPU, from how often each expert is used.

rebalance_experts  the public algorithm (EPLB), result for result
place_experts      the default: never busier than that, no expert twice on a GPU, traffic and moves weighed
read_loads         loads from a matrix or from a run's metrics
replay             what refreshing the placement over recorded loads would have gained
plan_placement     all of it in one answer, for the command line
"""

from dsv3.plan.placement.eplb import rebalance_experts
from dsv3.plan.placement.loads import LoadHistory, read_loads
from dsv3.plan.placement.place import Placement, place_experts
from dsv3.plan.placement.plan import plan_placement, render
from dsv3.plan.placement.refresh import replay

__all__ = [
    "LoadHistory",
    "Placement",
    "place_experts",
    "plan_placement",
    "read_loads",
    "rebalance_experts",
    "render",
    "replay",
]
