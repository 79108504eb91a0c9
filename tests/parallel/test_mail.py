"""Messages between stages, as NCCL runs them: no order in which the ranks ask for them may end in a circle.

NCCL is not here; what matters of it is modelled. The messages of a rank in one process group run one after another, in
the order in which it asked for them, after what it had to compute before; a message occupies sender and receiver until
both are there.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from dsv3.parallel import mail
from dsv3.parallel.mail import Groups, Mail, links
from dsv3.parallel.mesh import Axis, Layout, Mesh
from dsv3.parallel.pipeline import forward_only
from dsv3.plan.schedules import Schedule, make_schedule

TIMEOUT = datetime.timedelta(seconds=7)


@dataclass
class Message:
    """One end of it, as its rank asked for it."""

    group: tuple[int, ...]
    source: int
    target: int
    after: int  # steps of the rank that come before
    over: bool = False

    def wait(self) -> None:
        """Only asked for by what `needed` notes."""

    def is_completed(self) -> bool:
        return False


@dataclass
class Program:
    """What one rank asks for."""

    rank: int
    steps: int = 0
    messages: list[Message] = field(default_factory=list)
    needed: dict[int, list[Message]] = field(default_factory=lambda: defaultdict(list))  # by step

    # What `mail` uses of torch.distributed.

    def new_group(self, members: list[int], timeout: datetime.timedelta) -> tuple[int, ...]:
        assert timeout == TIMEOUT
        return tuple(members)

    def send(self, tensor: torch.Tensor, peer: int, group: tuple[int, ...]) -> None:
        assert group == (self.rank, peer)

    def recv(self, tensor: torch.Tensor, peer: int, group: tuple[int, ...]) -> None:
        assert group == (peer, self.rank)

    def isend(self, tensor: torch.Tensor, peer: int, group: tuple[int, ...]) -> Message:
        self.messages.append(Message(group, self.rank, peer, self.steps + 1))
        return self.messages[-1]

    def irecv(self, tensor: torch.Tensor, peer: int, group: tuple[int, ...]) -> Message:
        message = Message(group, peer, self.rank, self.steps)
        message.wait = lambda: self.needed[self.steps].append(message)
        self.messages.append(message)
        return message


def programs(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """What the ranks of a pipeline ask for in a step."""
    ranks = tuple(range(schedule.num_ranks))
    for rank, steps in enumerate(schedule.ranks):
        program = Program(rank)
        monkeypatch.setattr(mail, "dist", program)
        mesh = Mesh(Layout(1, pp=len(ranks)), rank, pp=Axis(ranks, rank), timeout=TIMEOUT)
        groups = Groups(mesh, links(schedule), ())
        box = Mail(schedule, rank, groups, lambda message: torch.empty(0))
        for step in steps:
            for part in step.parts:
                box.receive(part)
            for part in step.parts:
                box.send(part, torch.empty(0))
            program.steps += 1
        yield program


def finishes(ranks: list[Program], group_of: Callable[[Message], Any]) -> bool:
    """Whether all steps come to be run; otherwise they wait in a circle."""
    queues: dict[Any, list[Message]] = defaultdict(list)
    for program in ranks:
        for message in program.messages:
            queues[program.rank, group_of(message)].append(message)
    done = [0] * len(ranks)
    moved = True
    while moved:
        moved = False
        for program in ranks:
            while done[program.rank] < program.steps and all(m.over for m in program.needed[done[program.rank]]):
                done[program.rank] += 1
                moved = True
        for (rank, group), queue in queues.items():
            other = queue and queues[queue[0].target, group]
            if not other or queue[0].source != rank or other[0].source != rank or queue[0].target != other[0].target:
                continue
            if done[rank] >= queue[0].after and done[queue[0].target] >= other[0].after:
                queue.pop(0).over = other.pop(0).over = moved = True
    return done == [program.steps for program in ranks] and not any(queues.values())


METHODS = {"1F1B": 1, "Interleaved1F1B": 2, "ZB1P": 1, "ZBV": 2, "DualPipeV": 2, "DualPipe": 1}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_no_schedule_waits_in_a_circle(monkeypatch: pytest.MonkeyPatch, method: str, ranks: int) -> None:
    schedule = make_schedule(method, ranks, 3 * ranks, stages_per_rank=METHODS[method])
    for one in (schedule, forward_only(schedule, 5)):
        asked = list(programs(one, monkeypatch))
        assert any(program.messages for program in asked)
        assert finishes(asked, lambda message: message.group)


@pytest.mark.parametrize("method", ["ZBV", "DualPipe"])
def test_one_group_per_direction_would(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Why there are as many groups as links; and that the model can see it."""
    asked = list(programs(make_schedule(method, 4, 12, stages_per_rank=METHODS[method]), monkeypatch))
    assert not finishes(asked, lambda message: message.source < message.target)
