"""Expert parallelism: tokens travel to the rank that has their expert, answers travel back.

`distribute_experts` leaves each rank E / R of the experts and replaces the dispatcher of every DeepSeekMoE; the
model's code does not know. Dispatch and combine are all-to-alls with a split per rank, and the backward pass of one
is the other. A rank that sends or receives nothing takes part all the same, forward and backward: nothing here asks
whether there are rows. Every rank must run the same number of forward passes.

Node-limited dispatch, after the report's section 3.2.2: between nodes a token travels once per node and not once per
expert, to the rank there with its sender's place, which hands it on inside the node, sums the node's answers and
sends one row home.

Every dispatcher is written once, in pieces (`dsv3.parallel.pieces`): `dispatch` and `combine` are their plain
composition; on a tape something else can be done while rows travel.

Shapes: T tokens here, D model, E experts in all, K chosen per token, R ranks, N rows sent or received,
P (token, node) pairs sent, M pairs received.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3.errors import UserError
from dsv3.model.experts import DeepSeekMoE, Dispatched, Dispatcher, LocalDispatcher
from dsv3.model.router import Routing
from dsv3.parallel.choices import Choices
from dsv3.parallel.exchange import RowExchange, Wires, exchange_counts
from dsv3.parallel.mesh import Axis, Mesh
from dsv3.parallel.pieces import AtOnce, Chunk, Runner, drain


def distribute_experts(model: nn.Module, mesh: Mesh, wires: Wires | None = None) -> None:
    """Keep of every layer's experts those of this rank, in place, and send tokens to the others from now on.

    Rank r of an ep group has experts [r E/R, (r + 1) E/R). wires: how rows are encoded on their way. Raises
    `UserError` if the experts cannot be divided evenly.
    """
    if mesh.ep.size == 1:
        return
    wires = wires or Wires()
    dispatcher: Dispatcher = ExpertDispatcher(mesh.ep, wires)
    # Where every node has one rank, a token's only way to a node is the way to its rank.
    if mesh.ep_across.size > 1 and mesh.ep_node.size > 1:
        dispatcher = NodeLimitedDispatcher(mesh.ep_across, mesh.ep_node, wires)
    for module in model.modules():
        if not isinstance(module, DeepSeekMoE):
            continue
        experts = module.experts.gate_up_proj.shape[0]
        if experts % mesh.ep.size:
            raise UserError(f"ep is {mesh.ep.size}, expected a divisor of the model's {experts} routed experts")
        share = experts // mesh.ep.size
        for name, parameter in list(module.experts.named_parameters(recurse=False)):
            own = parameter.detach()[mesh.ep.index * share : (mesh.ep.index + 1) * share].clone()
            setattr(module.experts, name, nn.Parameter(own))
        module.dispatcher = dispatcher


class CutDispatcher(ABC):
    """A `Dispatcher` in pieces, which a `Runner` runs at once or with something else in between."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """As in `LocalDispatcher`, for the experts of this rank. `routing` may have choices of expert -1: nobody's."""
        return drain(self.dispatch_on(AtOnce(), x_TD, routing))

    def combine(self, rows_ND: Tensor, dispatched: Dispatched) -> Tensor:
        """As in `LocalDispatcher`."""
        return drain(self.combine_on(AtOnce(), rows_ND, dispatched))

    @abstractmethod
    def dispatch_on(self, runner: Runner, x_TD: Tensor, routing: Routing) -> Chunk[Dispatched]:
        """`dispatch` in pieces."""

    @abstractmethod
    def combine_on(self, runner: Runner, rows_ND: Tensor, dispatched: Dispatched) -> Chunk[Tensor]:
        """`combine` in pieces."""


@dataclass(frozen=True)
class _Journey:
    """Which choices of the tokens here became rows, and where these went."""

    home: Choices
    way: RowExchange


@dataclass(frozen=True)
class _Sent(Dispatched):
    """Rows of this rank's experts, from all ranks."""

    journey: _Journey


class ExpertDispatcher(CutDispatcher):
    """Rows sorted by expert are sorted by rank too: they are sent as they lie, and sorted by expert once there."""

    def __init__(self, axis: Axis, wires: Wires) -> None:
        self._axis, self._wires = axis, wires
        self._here = LocalDispatcher()

    def dispatch_on(self, runner: Runner, x_TD: Tensor, routing: Routing) -> Chunk[Dispatched]:
        rows_ND, weights_N, counts_RE, journey = runner.run(self._leave, x_TD, routing)
        way = journey.way
        rows_ND, weights_N = yield from runner.cross((way, rows_ND), (way.plain(), weights_N))
        here = runner.run(self._arrive, rows_ND, weights_N, counts_RE)
        return _Sent(**vars(here), journey=journey)

    def combine_on(self, runner: Runner, rows_ND: Tensor, dispatched: Dispatched) -> Chunk[Tensor]:
        assert isinstance(dispatched, _Sent)
        answers_ND = runner.run(self._here.combine, rows_ND, dispatched)
        (answers_ND,) = yield from runner.cross((dispatched.journey.way.transposed(), answers_ND))
        return runner.run(dispatched.journey.home.sum, answers_ND)

    def _leave(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor, _Journey]:
        """Rows [N, D] and their weights [N], sorted by rank; what will come, by sender and expert of this rank."""
        home = Choices.sort(routing.expert_ids_TK, routing.scores_TE.shape[1])
        sent_RE = home.counts_E.view(self._axis.size, -1)
        received_RE = exchange_counts(sent_RE, self._axis)
        # One copy to the CPU: the splits of an all-to-all are numbers.
        send, receive = torch.stack((sent_RE.sum(1), received_RE.sum(1))).tolist()
        way = RowExchange(self._axis, send, receive, self._wires.dispatch, self._wires.combine)
        return home.rows(x_TD), home.values(routing.weights_TK), received_RE, _Journey(home, way)

    def _arrive(self, rows_ND: Tensor, weights_N: Tensor, counts_RE: Tensor) -> Dispatched:
        """What arrived is a batch of tokens with one choice each, by sender and expert.

        The sort is stable, so that an expert's rows lie in the order of the ranks, which is that of the step's tokens.
        """
        R, E = counts_RE.shape
        experts_E = torch.arange(E, device=counts_RE.device).repeat(R)
        ids_N = experts_E.repeat_interleave(counts_RE.flatten(), output_size=rows_ND.shape[0])
        return self._here.dispatch(rows_ND, _routing(ids_N.unsqueeze(1), weights_N.unsqueeze(1), counts_RE.sum(0)))


@dataclass(frozen=True)
class _Relayed(_Sent):
    """Sent on by the relays of this node. `across`: which tokens left for which node."""

    across: _Journey


class NodeLimitedDispatcher(CutDispatcher):
    """A row per token and node between nodes, a row per token and expert inside them."""

    def __init__(self, across: Axis, node: Axis, wires: Wires) -> None:
        self._across, self._wires = across, wires
        self._inside = ExpertDispatcher(node, wires)

    def dispatch_on(self, runner: Runner, x_TD: Tensor, routing: Routing) -> Chunk[Dispatched]:
        share = routing.scores_TE.shape[1] // self._across.size  # experts of a node
        rows_PD, weights_PK, ids_PK, journey = runner.run(self._leave, x_TD, routing, share)
        way = journey.way
        rows_MD, weights_MK, ids_MK = yield from runner.cross(
            (way, rows_PD), (way.plain(), weights_PK), (way.plain(), ids_PK)
        )
        passed_on = _routing(ids_MK, weights_MK, ids_MK.new_empty(share))
        inside = yield from self._inside.dispatch_on(runner, rows_MD, passed_on)
        return _Relayed(**vars(inside), across=journey)

    def combine_on(self, runner: Runner, rows_ND: Tensor, dispatched: Dispatched) -> Chunk[Tensor]:
        assert isinstance(dispatched, _Relayed)
        sums_MD = yield from self._inside.combine_on(runner, rows_ND, dispatched)
        (sums_PD,) = yield from runner.cross((dispatched.across.way.transposed(), sums_MD))
        return runner.run(dispatched.across.home.sum, sums_PD)

    def _leave(self, x_TD: Tensor, routing: Routing, share: int) -> tuple[Tensor, Tensor, Tensor, _Journey]:
        """Tokens [P, D] sorted by node; with each its choices: weights, and experts as the node counts them."""
        nodes = self._across.size
        # A token's choices among the nodes: n where it has an expert on node n, else -1.
        node_TK = routing.expert_ids_TK // share
        visits_TN = torch.full((x_TD.shape[0], nodes), -1, device=x_TD.device).scatter(1, node_TK, node_TK)
        home = Choices.sort(visits_TN, nodes)
        sent_R1 = home.counts_E.unsqueeze(1)
        received_R1 = exchange_counts(sent_R1, self._across)
        send, receive = torch.cat((sent_R1, received_R1), 1).t().tolist()
        # Choices of other nodes are -1 to this one.
        here_PK = node_TK[home.tokens_N] == home.values(visits_TN).unsqueeze(1)
        ids_PK = torch.where(here_PK, routing.expert_ids_TK[home.tokens_N] % share, -1)
        way = RowExchange(self._across, send, receive, self._wires.dispatch, self._wires.combine)
        return home.rows(x_TD), home.rows(routing.weights_TK), ids_PK, _Journey(home, way)


def _routing(ids_TK: Tensor, weights_TK: Tensor, counts_E: Tensor) -> Routing:
    """A routing for a dispatcher, which asks of the scores only how many experts there are."""
    return Routing(ids_TK, weights_TK, weights_TK.new_empty(0, counts_E.shape[0]), counts_E)
