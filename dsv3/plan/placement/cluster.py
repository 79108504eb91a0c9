"""What experts are placed on, and the checks of what is placed: one clear error instead of a wrong placement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv3.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """`num_replicas` slots, as many on every GPU, as many GPUs on every node; slots count on over GPUs and nodes.

    `num_groups` are the groups of experts that node-limited routing chooses first. Raises `UserError` if the numbers
    do not divide.
    """

    num_replicas: int
    num_groups: int
    num_nodes: int
    num_gpus: int

    def __post_init__(self) -> None:
        for name in ("num_replicas", "num_groups", "num_nodes", "num_gpus"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} is {value!r}, expected a whole number of at least 1")
        if self.num_gpus % self.num_nodes:
            raise UserError(
                f"num_gpus is {self.num_gpus}, expected a multiple of num_nodes ({self.num_nodes}): "
                f"{_multiples(self.num_gpus, self.num_nodes)} would work"
            )
        if self.num_replicas % self.num_gpus:
            raise UserError(
                f"num_replicas is {self.num_replicas}, expected a multiple of num_gpus ({self.num_gpus}): "
                f"{_multiples(self.num_replicas, self.num_gpus)} would work"
            )

    @property
    def slots_per_gpu(self) -> int:
        """Experts that a GPU holds."""
        return self.num_replicas // self.num_gpus

    @property
    def gpus_per_node(self) -> int:
        """GPUs of a node."""
        return self.num_gpus // self.num_nodes

    @property
    def gpu_of_slot(self) -> NDArray[np.int64]:
        """The GPU of each slot, [num_replicas]."""
        return np.arange(self.num_replicas) // self.slots_per_gpu

    @property
    def node_of_slot(self) -> NDArray[np.int64]:
        """The node of each slot, [num_replicas]."""
        return self.gpu_of_slot // self.gpus_per_node

    @property
    def groups_fill_nodes(self) -> bool:
        """Whether whole groups can be dealt out to the nodes, as many to each."""
        return self.num_groups % self.num_nodes == 0

    @property
    def flat(self) -> Cluster:
        """The same GPUs with groups and nodes forgotten."""
        return Cluster(self.num_replicas, 1, 1, self.num_gpus)


def check_loads(weight: Any, cluster: Cluster) -> NDArray[np.float64]:
    """`weight` as float64 [layers, experts], if it can be placed on `cluster`; raises `UserError` if not."""
    try:
        loads = np.asarray(weight, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"expert loads are no matrix of numbers ({error}); expected one row per layer") from error
    if loads.ndim != 2 or 0 in loads.shape:
        raise UserError(f"expert loads have the shape {loads.shape}, expected [layers, experts]")
    # The public algorithm computes in float32: what overflows there cannot be compared.
    wrong = np.argwhere(~((loads >= 0) & (loads <= np.finfo(np.float32).max / loads.shape[1])))
    if len(wrong):
        layer, expert = wrong[0]
        raise UserError(
            f"the load of expert {expert} in layer {layer} is {loads[layer, expert]}, expected a finite number of at "
            f"least 0 ({len(wrong)} such); count tokens again or drop that record"
        )
    num_experts = loads.shape[1]
    if cluster.num_replicas < num_experts:
        least = -(-num_experts // cluster.num_gpus) * cluster.num_gpus
        raise UserError(
            f"num_replicas is {cluster.num_replicas}, expected at least one for each of the {num_experts} experts: "
            f"{least} would work on {cluster.num_gpus} GPUs"
        )
    if num_experts % cluster.num_groups:
        divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise UserError(
            f"num_groups is {cluster.num_groups}, expected a divisor of the {num_experts} experts: one of {divisors}"
        )
    return loads


def _multiples(value: int, divisor: int) -> str:
    """The multiples next to `value`."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"
