"""Two chunks in turns: who runs while what travels, and that a block in stages is the block."""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3.model.block import Block
from dsv3.model.context import make_context, whole_sequences
from dsv3.model.experts import DeepSeekMoE, Dispatched, LocalDispatcher
from dsv3.model.router import Routing
from dsv3.parallel.expert import CutDispatcher
from dsv3.parallel.layout import parse_layout
from dsv3.parallel.overlap import block_on, interleave
from dsv3.parallel.pieces import Chunk, Runner, drain
from dsv3.parallel.stages import RankModel, Stage
from dsv3.parallel.tape import Tape, slot_of
from tests.variants import BASE, random_model, random_tokens

Log = list[tuple[str, str]]


@dataclass
class Underway:
    """x comes back as it left, but only after `wait`: before, it is NaN."""

    x: Tensor
    name: str
    log: Log
    there: bool = False

    def wait(self) -> None:
        self.log.append(("wait", self.name))
        self.there = True

    def arrived(self) -> Tensor:
        return self.x.clone() if self.there else torch.full_like(self.x, torch.nan)


@dataclass
class Loopback:
    name: str
    log: Log

    def start(self, x: Tensor) -> Underway:
        self.log.append(("start", self.name))
        return Underway(x.clone(), self.name, self.log)

    def transposed(self) -> Loopback:
        return Loopback(f"{self.name} back", self.log)


class LoopbackDispatcher(CutDispatcher):
    """Every expert is here, but its rows take a way. `hops` of them, as between nodes and inside one."""

    def __init__(self, log: Log, name: str, hops: int = 1) -> None:
        self.log, self.name, self.hops = log, name, hops
        self.here = LocalDispatcher()

    def dispatch_on(self, runner: Runner, x_TD: Tensor, routing: Routing) -> Chunk[Dispatched]:
        x_TD = yield from self.travel(runner, "dispatch", x_TD)
        return runner.run(self.here.dispatch, x_TD, routing)

    def combine_on(self, runner: Runner, rows_ND: Tensor, dispatched: Dispatched) -> Chunk[Tensor]:
        rows_ND = yield from self.travel(runner, "combine", rows_ND)
        return runner.run(self.here.combine, rows_ND, dispatched)

    def travel(self, runner: Runner, way: str, x: Tensor) -> Chunk[Tensor]:
        for hop in range(self.hops):
            x = runner.run(torch.clone, x)
            (x,) = yield from runner.cross((Loopback(f"{self.name} {way} {hop}", self.log), x))
        return x


class OneChoiceDispatcher(LoopbackDispatcher):
    """Rows travel, and not tokens: what arrives has one expert."""

    def dispatch_on(self, runner: Runner, x_TD: Tensor, routing: Routing) -> Chunk[Dispatched]:
        one = runner.run(first_choice, routing)
        return (yield from super().dispatch_on(runner, x_TD, one))


def first_choice(routing: Routing) -> Routing:
    return dataclasses.replace(
        routing, expert_ids_TK=routing.expert_ids_TK[:, :1], weights_TK=routing.weights_TK[:, :1]
    )


def moe_block(generator: torch.Generator) -> Block:
    block = random_model(BASE, generator, torch.float64).layers[1]
    assert isinstance(block, Block)
    return block


def inputs(generator: torch.Generator) -> tuple[Tensor, Tensor, Any]:
    h, g = (torch.randn(2, 7, BASE.hidden_size, generator=generator, dtype=torch.float64) for _ in range(2))
    return h, g, make_context(BASE, whole_sequences(7), h.device, aux_loss_scale=0.1)


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_block_in_stages_is_the_block(generator: torch.Generator, recompute: str, split: bool, hops: int) -> None:
    block = moe_block(generator)
    h, g, context = inputs(generator)
    x = h.clone().requires_grad_()
    expected, routing = block(x, context)
    expected.backward(g)
    gradients = {name: p.grad for name, p in block.named_parameters()}
    block.zero_grad()

    block.mlp.dispatcher = LoopbackDispatcher([], "", hops)
    tape = Tape(recompute)
    y = tape.enter(h)
    out, same_routing = drain(block_on(tape, block, y, context, in_stages=True))
    torch.testing.assert_close(out, expected)
    assert torch.equal(same_routing.counts_E, routing.counts_E)
    slot_of(out).add(g)
    drain(tape.backward(split=split))
    tape.backward_weights()
    torch.testing.assert_close(slot_of(y).grad, x.grad)
    torch.testing.assert_close({name: p.grad for name, p in block.named_parameters()}, gradients)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_has_travelled_is_not_kept(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    """No gradient needs rows on their way, so their memory is free."""
    memory: list[weakref.ref[torch.UntypedStorage]] = []
    arrived = Underway.arrived

    def noted(underway: Underway) -> Tensor:
        x = arrived(underway)
        memory.append(weakref.ref(x.untyped_storage()))
        return x

    monkeypatch.setattr(Underway, "arrived", noted)
    block = moe_block(generator)
    h, _, context = inputs(generator)
    block.mlp.dispatcher = OneChoiceDispatcher([], "", hops=2)
    tape = Tape(recompute)
    drain(block_on(tape, block, tape.enter(h), context, in_stages=True))
    assert [reference() for reference in memory] == [None] * 4


def test_weights_get_their_gradients_while_others_travel(generator: torch.Generator) -> None:
    """What nobody waits for is computed after the next transfer has been started, and where none follows, at once."""
    log: Log = []
    model = random_model(BASE.replace(num_hidden_layers=3), generator, torch.float64)
    h, g, context = inputs(generator)
    tape = Tape()
    x = tape.enter(h)
    for i in (1, 2):
        block = model.layers[i]
        block.mlp.dispatcher = LoopbackDispatcher(log, f"{i}")
        block.self_attn.o_proj.weight.register_post_accumulate_grad_hook(lambda _, i=i: log.append(("weight", f"{i}")))
        x, _ = drain(block_on(tape, block, x, context, in_stages=True))
    slot_of(x).add(g)
    log.clear()
    drain(tape.backward())
    ways = [f"{i} {way} 0 back" for i in (2, 1) for way in ("combine", "dispatch")]
    expected = [(event, way) for way in ways for event in ("start", "wait")]
    expected.insert(5, ("weight", "2"))
    assert log == [*expected, ("weight", "1")]


@pytest.mark.parametrize("hops", [1, 2])
def test_all_that_travels_is_covered_by_the_other_chunk(generator: torch.Generator, hops: int) -> None:
    """A forward of two layers beside a backward of two: while either's rows are under way, the other computes."""
    log: Log = []
    model = random_model(BASE.replace(num_hidden_layers=3), generator, torch.float64)
    h, g, context = inputs(generator)
    blocks = [model.layers[1], model.layers[2]]
    for i, block in enumerate(blocks):
        block.mlp.dispatcher = LoopbackDispatcher(log, f"{i}", hops)

    def forward(tape: Tape, name: str) -> Chunk[Tensor]:
        x = tape.enter(h)
        for block in blocks:
            x, _ = yield from named(block_on(tape, block, x, context, in_stages=True), name)
        return x

    def named(chunk: Chunk[Any], name: str) -> Chunk[Any]:
        result = None
        while True:
            log.append(("compute", name))
            try:
                transfers = next(chunk)
            except StopIteration as done:
                result = done.value
                break
            yield transfers
        return result

    first = Tape()
    out = drain(forward(first, "before"))
    slot_of(out).add(g)
    log.clear()
    interleave([forward(Tape(), "forward"), named(first.backward(), "backward")])
    started: dict[str, int] = {}
    covered = 0
    for position, (event, name) in enumerate(log):
        if event == "start":
            started[name] = position
        elif event == "wait":
            between = {who for what, who in log[started[name] : position] if what == "compute"}
            other = "forward" if name.endswith("back") else "backward"
            covered += other in between
    assert len(started) == 8 * hops
    assert covered == 8 * hops, log


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_an_mtp_module_of_a_stage_stops_where_its_rows_travel(generator: torch.Generator, recompute: str) -> None:
    model = random_model(BASE, generator, torch.float64)
    (part,) = parse_layout("EttmL", BASE)
    tokens = random_tokens(BASE, (2, 8), generator)
    context = make_context(BASE, whole_sequences(8), tokens.device, aux_loss_scale=0.1)

    def gradients(in_stages: bool) -> tuple[int, dict[str, Tensor]]:
        """How often a driver could do something else, forward and backward."""
        model.zero_grad()
        tape = Tape(recompute)
        stage = Stage(RankModel(model, [part]), part)

        def loss(hiddens: tuple[Tensor, ...], head_VD: Tensor) -> Tensor:
            return sum((h @ head_VD.T).square().sum() for h in hiddens)

        chunk = stage.forward(tape, None, tokens, context, loss, mtp=True, in_stages=in_stages)
        forward, done = stops(chunk)
        slot_of(done.output).add(torch.ones_like(done.output))
        backward, _ = stops(tape.backward())
        assert forward == backward
        return forward, {name: p.grad for name, p in model.named_parameters()}

    whole_stops, expected = gradients(False)
    blocks = [module for module in model.modules() if isinstance(module, DeepSeekMoE)]
    for i, moe in enumerate(blocks):
        moe.dispatcher = LoopbackDispatcher([], f"{i}")
    found_stops, found = gradients(True)
    assert whole_stops == 0 and len(blocks) == 2
    assert found_stops == 2 * len(blocks)
    torch.testing.assert_close(found, expected)


def stops(chunk: Chunk[Any]) -> tuple[int, Any]:
    count = 0
    while True:
        try:
            transfers = next(chunk)
        except StopIteration as done:
            return count, done.value
        transfers.wait()
        count += 1


def test_turns_and_results() -> None:
    log: list[str] = []

    class Note:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self) -> None:
            log.append(f"wait {self.name}")

    def chunk(name: str, transfers: int) -> Chunk[str]:
        for i in range(transfers):
            log.append(f"{name}{i}")
            yield Note(f"{name}{i}")
        return name

    assert interleave([chunk("f", 1), chunk("b", 2)]) == ["f", "b"]
    assert log == ["b0", "f0", "wait b0", "b1", "wait f0", "wait b1"]
    assert drain(chunk("x", 2)) == "x"


def test_what_is_read_before_it_arrived_shows(generator: torch.Generator) -> None:
    """The tests' own means: a driver that does not wait gets NaN."""
    h, _, context = inputs(generator)
    block = moe_block(generator)
    block.mlp.dispatcher = LoopbackDispatcher([], "")
    tape = Tape()
    chunk = block_on(tape, block, tape.enter(h), context, in_stages=True)
    with pytest.raises(StopIteration) as done:
        while True:
            next(chunk)
    assert done.value.value[0].isnan().any()
