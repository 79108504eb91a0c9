"""Where every process stands: the one place that lays out pipeline, data and expert axes.

Processes are numbered pipeline stage first, then data replica, then data shard, so that neighbours, which share a
node and its fast links, are data and expert neighbours:

    rank = (pp_index * dp_replicate + replicate_index) * dp_shard + shard_index

    pp              stages of the model, one after the other
    dp_replicate    each has whole parameters, and shares the optimizer's state with the others (ZeRO-1)
    dp_shard        each has its rows of every parameter, gathered when they are needed (FSDP2; `lending` in pipelines)
    ep              routed experts spread over neighbours on the data axis (replicate and shard together)

Dense parameters are alike on the whole data axis. Experts are alike on the data ranks that have the same place in
their ep group: every ep-th rank, again split into replicas and shards. A loss is a sum over the step's tokens, so
gradients are summed over those axes, never averaged.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dsv3.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes. `dp_replicate` None: whatever the other sizes leave of the processes there are."""

    dp_replicate: int | None = None
    dp_shard: int = 1
    ep: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "ep", "pp"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, expected at least 1")

    def resolve(self, processes: int) -> Layout:
        """With `dp_replicate` filled in. Raises `UserError` if the sizes do not make up `processes`."""
        fixed = self.dp_shard * self.pp
        replicate = self.dp_replicate or max(processes // fixed, 1)
        if replicate * fixed != processes:
            sizes = f"pp {self.pp} x dp_shard {self.dp_shard}"
            if self.dp_replicate is not None:
                sizes += f" x dp_replicate {self.dp_replicate}"
            raise UserError(
                f"{sizes} does not make up {processes} process{'es' * (processes != 1)}: start as many as the product "
                "of the sizes (torchrun --nproc-per-node), or change the sizes"
            )
        data = replicate * self.dp_shard
        if data % self.ep or (self.dp_shard % self.ep and self.ep % self.dp_shard):
            raise UserError(
                f"ep is {self.ep}, expected a divisor of dp_replicate x dp_shard ({replicate} x {self.dp_shard}) that "
                "divides dp_shard or is a multiple of it"
            )
        return Layout(replicate, self.dp_shard, self.ep, self.pp)


@dataclass(frozen=True)
class Axis:
    """The processes that differ from this one along one axis only, and this one's place among them."""

    ranks: tuple[int, ...]  # in the order of the axis
    index: int
    group: dist.ProcessGroup | None = field(default=None, compare=False)  # None: this process is alone

    @property
    def size(self) -> int:
        return len(self.ranks)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, summed in place over the axis."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor


ALONE = Axis((0,), 0)


@dataclass(frozen=True)
class Mesh:
    """This process's axes. `Mesh()` is a process that is alone."""

    layout: Layout = Layout(1)
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    world: Axis = ALONE
    pp: Axis = ALONE
    data: Axis = ALONE  # replicate x shard
    replicate: Axis = ALONE
    shard: Axis = ALONE
    ep: Axis = ALONE
    ep_node: Axis = ALONE  # the ep ranks of this node
    ep_across: Axis = ALONE  # the ep ranks with this one's place in their nodes
    expert_data: Axis = ALONE  # data ranks that hold the same experts: expert_replicate x expert_shard
    expert_replicate: Axis = ALONE
    expert_shard: Axis = ALONE
    host: Axis = ALONE  # the world once more, for tensors in CPU memory
    background: Axis = ALONE  # and again, for a background thread: a group serves one thread only
    timeout: datetime.timedelta | None = None  # of every group; None: torch's own

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all: prints, logs, names files."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world.size > 1


def is_launched() -> bool:
    """Whether torchrun (or something with its environment) started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def connect(
    layout: Layout, device: torch.device, *, timeout_seconds: float = 600, node_size: int | None = None
) -> Mesh:
    """Join the other processes that torchrun started, and lay out the axes; gloo on a CPU, NCCL on a GPU.

    device: the kind; of GPUs each process of a node takes its own. timeout_seconds: how long a collective may wait
    for a process before the job is given up. node_size: processes a node has; None takes torchrun's word for it.
    Raises `UserError`, before anything is waited for, if the sizes do not make up the processes there are.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    layout = layout.resolve(processes)
    if processes == 1:
        return Mesh(layout, device=device)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is '{device.type}', which cannot run in several processes: choose cpu or cuda")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        device = _own_gpu(int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        store, rank, processes = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps its store when it starts processes again. What those before left in it (their addresses)
        # must not be found.
        store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            backend,
            timeout=timeout,
            store=store,
            rank=rank,
            world_size=processes,
            device_id=device if device.type == "cuda" else None,
        )
    node_size = node_size or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return _lay_out(layout, dist.get_rank(), device, node_size, timeout)


def disconnect() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def axis_lines(layout: Layout, node_size: int) -> dict[str, list[tuple[int, ...]]]:
    """Every line of every axis: which ranks it joins, in order. `layout` is resolved.

    All processes make the groups of all lines in this one order, as torch demands.
    """
    assert layout.dp_replicate is not None
    R, S, E, P = layout.dp_replicate, layout.dp_shard, layout.ep, layout.pp
    expert_shards = max(S // E, 1)
    nodes = E // node_size if node_size < E and E % node_size == 0 else 1
    ranks = torch.arange(P * R * S)
    dense_PRS = ranks.view(P, R, S)
    experts_PRSE = ranks.view(P, -1, expert_shards, E)
    nodes_DNL = ranks.view(-1, nodes, E // nodes)
    return {
        "world": _lines(ranks.view(1, -1)),
        "pp": _lines(dense_PRS.permute(1, 2, 0)),
        "data": _lines(dense_PRS.reshape(P, -1)),
        "replicate": _lines(dense_PRS.permute(0, 2, 1)),
        "shard": _lines(dense_PRS),
        "ep": _lines(experts_PRSE),
        "ep_node": _lines(nodes_DNL),
        "ep_across": _lines(nodes_DNL.permute(0, 2, 1)),
        "expert_data": _lines(experts_PRSE.flatten(1, 2).permute(0, 2, 1)),
        "expert_replicate": _lines(experts_PRSE.permute(0, 2, 3, 1)),
        "expert_shard": _lines(experts_PRSE.permute(0, 1, 3, 2)),
    }


def _own_gpu(local_rank: int) -> torch.device:
    if local_rank >= (found := torch.cuda.device_count()):
        raise UserError(
            f"this node has {found} GPU{'s' * (found != 1)}, but process {local_rank} of it was started, expected one "
            f"process per GPU: start {found} per node (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", local_rank)


def _lines(ranks: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(line.tolist()) for line in ranks.reshape(-1, ranks.shape[-1])]


def _lay_out(layout: Layout, rank: int, device: torch.device, node_size: int, timeout: datetime.timedelta) -> Mesh:
    # Axes that join the same ranks share one group: a group costs connections.
    make = _group_maker(timeout)
    axes = {name: _own_axis(lines, rank, make) for name, lines in axis_lines(layout, node_size).items()}
    world = axes["world"].ranks
    host, background = (Axis(world, rank, dist.new_group(world, timeout=timeout, backend="gloo")) for _ in range(2))
    return Mesh(layout, rank, device, host=host, background=background, timeout=timeout, **axes)


def _group_maker(timeout: datetime.timedelta) -> Callable[[tuple[int, ...]], dist.ProcessGroup | None]:
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def make(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        if len(ranks) == 1:
            return None
        if ranks not in groups:
            groups[ranks] = dist.new_group(ranks, timeout=timeout)
        return groups[ranks]

    return make


def _own_axis(
    lines: list[tuple[int, ...]], rank: int, make: Callable[[tuple[int, ...]], dist.ProcessGroup | None]
) -> Axis:
    made = {line: make(line) for line in lines}
    own = next(line for line in lines if rank in line)
    return Axis(own, own.index(rank), made[own])
