"""What travels between the stages of a pipeline, and over which process groups.

Who sends what to whom in which order is known before the step. So receivers post their buffers in the order of the
sender, and no size and no tag is negotiated.

Every link, a sender and a receiver, has a group of its own. With NCCL (and the communicators that torch makes at once
when it knows the device) the messages of a group go one after another in the order in which a rank asked for them,
those to and from other ranks too, and a message occupies both its ends until it is over. In a group of the pipeline,
even in one per direction, ZBV and DualPipe on four ranks would come to wait in a circle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.parallel.mesh import Mesh, axis_lines
from dsv3.plan.schedules import Op, Schedule

Message = tuple[str, int, int]
"""("F" hidden states or "B" a gradient, the stage they are for, the micro-batch)."""


class Groups:
    """Process groups within the pipeline: one per link, and one for each set of ranks that share parameters."""

    def __init__(self, mesh: Mesh, links: Iterable[tuple[int, int]], shared: Iterable[tuple[int, ...]]) -> None:
        self.axis = mesh.pp
        self._links: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._shared: dict[tuple[int, ...], dist.ProcessGroup] = {}
        # All processes make the groups of all pipelines, in one order, as torch demands.
        wanted = [(self._links, link) for link in sorted(links)] + [(self._shared, ranks) for ranks in sorted(shared)]
        for line in axis_lines(mesh.layout, 1)["pp"] if mesh.pp.size > 1 else ():
            for groups, indices in wanted:
                members = [line[i] for i in indices]
                group = dist.new_group(members, timeout=mesh.timeout)
                if mesh.rank in members:
                    groups[indices] = group
        self._open(mesh.device)

    def _open(self, device: torch.device) -> None:
        """Send a first message over each link, in one order for all ranks.

        Where NCCL connects two ranks only at their first message, both wait for each other then: in the order of a
        schedule each might wait for another.
        """
        for (source, target), group in sorted(self._links.items()):
            empty = torch.zeros(1, device=device)
            if self.axis.index == source:
                dist.send(empty, self.axis.ranks[target], group=group)
            else:
                dist.recv(empty, self.axis.ranks[source], group=group)

    def towards(self, source: int, target: int) -> dist.ProcessGroup:
        """The group for messages of this link."""
        return self._links[source, target]

    def of(self, indices: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The group of ranks that share something; None where nothing is shared."""
        return self._shared.get(indices)

    def close(self) -> None:
        """Give back the groups made here."""
        for group in (*self._links.values(), *self._shared.values()):
            dist.destroy_process_group(group)


class Mail:
    """The messages of one step. A channel (one sender to this rank) is read in the order in which it is written."""

    def __init__(self, schedule: Schedule, rank: int, groups: Groups, buffer: Callable[[Message], Tensor]) -> None:
        self._schedule, self._rank, self._groups, self._buffer = schedule, rank, groups, buffer
        self._coming: dict[int, deque[Message]] = {}
        for source, steps in enumerate(schedule.ranks):
            messages = [_message(schedule, op) for step in steps for op in step.parts]
            self._coming[source] = deque(
                message for message in messages if message is not None and self._target(message) == rank
            )
        self._posted: dict[Message, tuple[Tensor, Any]] = {}
        self._here: dict[Message, Tensor] = {}  # from one stage of this rank to another
        self._leaving: deque[tuple[Tensor, Any]] = deque()

    def receive(self, op: Op) -> Tensor | None:
        """What `op` needs from another stage; None if it needs nothing. Waits until it is there."""
        wanted, source = _wanted(self._schedule, op), sender(self._schedule, op)
        if wanted is None or source is None:
            return None
        if source == self._rank:
            return self._here.pop(wanted)
        group = self._groups.towards(source, self._rank)
        while wanted not in self._posted:
            message = self._coming[source].popleft()
            buffer = self._buffer(message)
            self._posted[message] = buffer, dist.irecv(buffer, self._groups.axis.ranks[source], group=group)
        buffer, work = self._posted.pop(wanted)
        work.wait()
        return buffer

    def send(self, op: Op, result: Tensor | None) -> None:
        """Pass on what `op` has made, if a stage waits for it."""
        message = _message(self._schedule, op)
        if message is None:
            return
        assert result is not None
        target = self._target(message)
        result = result.detach().contiguous()
        if target == self._rank:
            self._here[message] = result
            return
        while self._leaving and self._leaving[0][1].is_completed():
            self._leaving.popleft()
        group = self._groups.towards(self._rank, target)
        work = dist.isend(result, self._groups.axis.ranks[target], group=group)
        self._leaving.append((result, work))

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for _, work in self._leaving:
            work.wait()

    def _target(self, message: Message) -> int:
        _, stage, micro_batch = message
        return self._schedule.rank_of(stage, micro_batch)


def sender(schedule: Schedule, op: Op) -> int | None:
    """The rank of the pipeline that makes what `op` needs from another stage; None if it needs nothing."""
    if (wanted := _wanted(schedule, op)) is None:
        return None
    kind, stage, micro_batch = wanted
    return schedule.rank_of(stage - 1 if kind == "F" else stage + 1, micro_batch)


def links(schedule: Schedule) -> list[tuple[int, int]]:
    """(sender, receiver) of all messages between ranks, each pair once, in order."""
    messages = [
        (source, _message(schedule, op)) for source, steps in enumerate(schedule.ranks) for s in steps for op in s.parts
    ]
    pairs = {(source, schedule.rank_of(*message[1:])) for source, message in messages if message is not None}
    return sorted((source, target) for source, target in pairs if source != target)


def _message(schedule: Schedule, op: Op) -> Message | None:
    """What an operation makes for another stage."""
    if op.kind == "F" and op.stage < schedule.num_stages - 1:
        return "F", op.stage + 1, op.micro_batch
    if op.kind in "BI" and op.stage > 0:
        return "B", op.stage - 1, op.micro_batch
    return None


def _wanted(schedule: Schedule, op: Op) -> Message | None:
    """What an operation needs from another stage."""
    if op.kind == "F" and op.stage > 0:
        return "F", op.stage, op.micro_batch
    if op.kind in "BI" and op.stage < schedule.num_stages - 1:
        return "B", op.stage, op.micro_batch
    return None
