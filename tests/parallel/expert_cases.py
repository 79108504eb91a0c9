"""What the ranks of `test_expert.py` run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from dsv3.config import ModelConfig
from dsv3.model.experts import DeepSeekMoE, LocalDispatcher
from dsv3.model.router import Routing
from dsv3.parallel.exchange import PlainWire, Wires
from dsv3.parallel.expert import CutDispatcher, distribute_experts
from dsv3.parallel.naive import AllGatherDispatcher
from dsv3.parallel.pieces import AtOnce, drain
from dsv3.parallel.tape import Tape, slot_of
from tests.parallel.world import mesh_of

CONFIG = ModelConfig.preset("micro")


def dispatch_and_back(*, seed: int, tokens: list[int], choose: str, how: str, node_size: int, dtype: str = "float64"):
    """Largest relative differences of output and gradients between one process and this rank of an ep group.

    tokens: how many each rank has. choose: "any" experts, or only those of the "first" rank. how: "sent", "naive";
    "cut", on a tape, its backward pass whole or "split".
    """
    mesh = mesh_of(node_size, ep=len(tokens))
    kind = getattr(torch, dtype)
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    moe = DeepSeekMoE(CONFIG).to(kind)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    E, K, T = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok, sum(tokens)
    x_TD = torch.randn(T, CONFIG.hidden_size, generator=random, dtype=torch.float64).to(kind)
    reach = E // len(tokens) if choose == "first" else E
    ids_TK = torch.rand(T, reach, generator=random).argsort(1)[:, :K]
    weights_TK = torch.rand(T, K, generator=random, dtype=torch.float64)
    grad_TD = torch.randn(T, CONFIG.hidden_size, generator=random, dtype=torch.float64).to(kind)

    def through(rows: slice) -> dict[str, torch.Tensor]:
        x = x_TD[rows].clone().requires_grad_()
        weights = weights_TK[rows].clone().requires_grad_()
        moe.zero_grad()
        routing = Routing(ids_TK[rows], weights, weights.new_empty(len(x), E), torch.zeros(E))
        if how in ("cut", "split") and isinstance(moe.dispatcher, CutDispatcher):
            out = on_a_tape(moe, x, routing, grad_TD[rows], split=how == "split")
        else:
            dispatched = moe.dispatcher.dispatch(x, routing)
            out = moe.experts(dispatched.rows_ND, dispatched.weights_N, dispatched.counts_E)
            out = moe.dispatcher.combine(out, dispatched)
            out.backward(grad_TD[rows])
        grads = {name: parameter.grad for name, parameter in moe.experts.named_parameters()}
        return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **grads}

    alone = through(slice(0, T))
    wire = PlainWire(torch.bfloat16) if how == "bf16" else PlainWire()
    distribute_experts(moe, mesh, Wires(wire, wire))
    assert moe.experts.gate_up_proj.shape[0] == E // len(tokens)
    assert not isinstance(moe.dispatcher, LocalDispatcher)
    if how == "naive":
        moe.dispatcher = AllGatherDispatcher(mesh.ep)
    first = sum(tokens[: mesh.rank])
    own = slice(first, first + tokens[mesh.rank])
    experts = slice(mesh.rank * E // len(tokens), (mesh.rank + 1) * E // len(tokens))
    here = through(own)
    return {
        name: difference(value, alone[name][experts if name.endswith("proj") else own]) for name, value in here.items()
    }


def on_a_tape(
    moe: DeepSeekMoE, x_TD: torch.Tensor, routing: Routing, grad_TD: torch.Tensor, *, split: bool
) -> torch.Tensor:
    """What dispatch, experts and combine make of x; gradients go where they belong."""
    tape = Tape()
    entered_TD, weights_TK = tape.enter(x_TD), tape.enter(routing.weights_TK)
    entered = dataclasses.replace(routing, weights_TK=weights_TK)
    dispatched = drain(moe.dispatcher.dispatch_on(tape, entered_TD, entered))
    out_ND = tape.run(moe.experts, dispatched.rows_ND, dispatched.weights_N, dispatched.counts_E)
    out_TD = drain(moe.dispatcher.combine_on(tape, out_ND, dispatched))
    slot_of(out_TD).add(grad_TD)
    drain(tape.backward(split=split))
    tape.backward_weights()
    x_TD.grad, routing.weights_TK.grad = slot_of(entered_TD).grad, slot_of(weights_TK).grad
    return out_TD


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, over the largest value of `theirs`."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if not theirs.numel():
        return 0.0
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def count_rows_between_nodes(*, seed: int, tokens: int) -> tuple[int, int]:
    """Rows that left for another node from this rank: with node-limited dispatch, and without."""
    sent: list[int] = []

    class Counting(AtOnce):
        def cross(self, *pairs):
            exchange, _ = pairs[0]  # the rows; weights and choices travel with them
            ranks = zip(exchange.axis.ranks, exchange.send, strict=True)
            sent.append(sum(count for rank, count in ranks if rank // 2 != mesh.rank // 2))
            return super().cross(*pairs)

    random = torch.Generator().manual_seed(seed)
    E, K = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok
    x_TD = torch.randn(tokens, CONFIG.hidden_size, generator=random)
    ids_TK = torch.rand(tokens, E, generator=random).argsort(1)[:, :K]
    routing = Routing(ids_TK, torch.ones(tokens, K), torch.ones(tokens, E), torch.zeros(E))
    totals = []
    for node_size in (2, 4):
        mesh = mesh_of(node_size, ep=4)
        moe = DeepSeekMoE(CONFIG)
        distribute_experts(moe, mesh)
        sent.clear()
        drain(moe.dispatcher.dispatch_on(Counting(), x_TD, routing))
        totals.append(sum(sent))
    nodes_T2 = torch.stack([(ids_TK // (E // 2) == node).any(1) for node in range(2)], 1)
    assert totals[0] == int(nodes_T2[:, 1 - mesh.rank // 2].sum())
    return totals[0], totals[1]


def wires_in_turn(*, seed: int) -> list[str]:
    """Which encoding rows had on each journey of a forward and a backward pass."""
    journeys: list[str] = []

    @dataclass(frozen=True)
    class Named(PlainWire):
        name: str = ""

        def pack(self, rows_ND):
            journeys.append(self.name)
            return super().pack(rows_ND)

    torch.manual_seed(seed)
    moe = DeepSeekMoE(CONFIG)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    distribute_experts(moe, mesh_of(ep=2), Wires(Named(name="dispatch"), Named(name="combine")))
    x_TD = torch.randn(4, CONFIG.hidden_size, requires_grad=True)
    ids_TK = torch.rand(4, CONFIG.n_routed_experts).argsort(1)[:, : CONFIG.num_experts_per_tok]
    weights_TK = torch.rand(ids_TK.shape)
    dispatched = moe.dispatcher.dispatch(
        x_TD, Routing(ids_TK, weights_TK, weights_TK.new_empty(4, CONFIG.n_routed_experts), ids_TK)
    )
    rows_ND = moe.experts(dispatched.rows_ND, dispatched.weights_N, dispatched.counts_E)
    moe.dispatcher.combine(rows_ND, dispatched).sum().backward()
    return journeys
