"""How passes over a run's model are made: over the whole model at once, or through the stages of a pipeline.

A training loop asks the same of both: the gradients of a step, the loss on some text, every layer's loads, where
something that is not finite began. So the loop does not know which of them it has.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dsv3.data.prepared import PreparedData
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.balance import LoadBalancer
from dsv3.model.transformer import Transformer, routed_layers
from dsv3.ops.cross_entropy import linear_cross_entropy
from dsv3.parallel.expert import distribute_experts
from dsv3.parallel.lending import Lender
from dsv3.parallel.pipeline import PassInput, Pipeline
from dsv3.parallel.pipeline_sharding import PipelineSharding
from dsv3.parallel.ranks import Ranks
from dsv3.parallel.shard import Sharding, cast_whole, shard_parameters
from dsv3.parallel.stages import RankModel, module_names
from dsv3.parallel.timeline import save_spans
from dsv3.plan.pipeline import Span
from dsv3.train.config import TrainConfig
from dsv3.train.evaluate import Case
from dsv3.train.guard import first_nonfinite, first_nonfinite_gradient
from dsv3.train.pipelined import pipelined_backward_step, planned_stages
from dsv3.train.sample import Sample, draw_sample
from dsv3.train.step import Losses, Observe, StepSettings, backward_step, micro_batches, pass_input
from dsv3.train.timetable import Step


class Execution(ABC):
    """What this process holds of the model (`model`, `sharding`), and how all processes together pass through it."""

    model: Transformer | RankModel
    sharding: Sharding
    eos_token_id: int
    isolate_at: int | None  # as of `StepSettings`
    can_sample = True

    def __init__(self, config: TrainConfig, ranks: Ranks, tokenizer: Tokenizer) -> None:
        self._config, self._ranks = config, ranks
        self.eos_token_id = tokenizer.eos_id
        self.isolate_at = tokenizer.document_start_id if config.isolate else None

    @abstractmethod
    def backward_step(
        self, balancer: LoadBalancer, tokens_BS1: Tensor, plan: Step, observe: Observe | None = None
    ) -> Losses:
        """Gradients and losses of a step, of whose sequences this process takes `tokens_BS1`.

        observe: told the routings made here of each of these sequences' micro-batches.
        """

    @abstractmethod
    def nats(self, cases: Iterable[Case]) -> float:
        """The main model's loss, summed over the targets of all cases. Without gradients."""

    @abstractmethod
    def sum_counts(self, counts_LE: Tensor) -> Tensor:
        """The balancer's counts of the layers here, summed over all processes that have them."""

    @abstractmethod
    def all_loads(self, loads: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The counts of every layer of the model, given those of the layers here; on the CPU."""

    def activity(self) -> str | None:
        """What this process is doing, in words, if there is more to tell than the call that it is in."""
        return None

    @abstractmethod
    def sample(self, data: PreparedData) -> Sample | None:
        """What the model writes now; None unless `can_sample`."""

    def nonfinite(
        self, masters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], tokens_BS1: Tensor, plan: Step
    ) -> str | None:
        """Where a step that is not finite went wrong first: in a weight, its forward pass, or a gradient.

        masters, gradients: of this process. All processes ask together, and get one answer.
        """
        parts = micro_batches(tokens_BS1, self._settings(plan)["micro_batch_size"], self._ranks)
        inputs = [pass_input(part, self.isolate_at) for part in parts]
        began = first_nonfinite(self.model, lambda: self._forward(inputs), weights=masters, agree=self._first)
        gradient = first_nonfinite_gradient(gradients)
        return self._last(gradient and f"the gradient of {gradient}") if began is None else began

    @abstractmethod
    def _forward(self, inputs: Sequence[PassInput]) -> None:
        """Forward passes whose outcome nobody wants."""

    def _first(self, found: str | None) -> str | None:
        """Of what processes found, what a forward pass meets first."""
        return self._ranks.first_found(found)

    def _last(self, found: str | None) -> str | None:
        """Of what processes found, what a forward pass meets last."""
        return self._ranks.first_found(found)

    def _settings(self, plan: Step) -> StepSettings:
        return {
            "micro_batch_size": self._config.micro_batch_size or plan.sequences,
            "mtp_weight": plan.mtp_weight,
            "eos_token_id": self.eos_token_id,
            "isolate_at": self.isolate_at,
            "ranks": self._ranks,
        }


class WholeModel(Execution):
    """Every process has all layers, if perhaps only some experts of each or some rows of each parameter."""

    model: Transformer

    def __init__(
        self, model: Transformer, config: TrainConfig, ranks: Ranks, tokenizer: Tokenizer, dtype: torch.dtype
    ) -> None:
        super().__init__(config, ranks, tokenizer)
        self.model = model
        model.recompute = config.recompute
        distribute_experts(model, ranks.mesh)
        self.sharding = shard_parameters(model, ranks.mesh, dtype)
        cast_whole(model, dtype, self.sharding)
        model.to_empty(device=ranks.mesh.device)

    def backward_step(
        self, balancer: LoadBalancer, tokens_BS1: Tensor, plan: Step, observe: Observe | None = None
    ) -> Losses:
        return backward_step(self.model, balancer, tokens_BS1, observe=observe, **self._settings(plan))

    @torch.no_grad()
    def nats(self, cases: Iterable[Case]) -> float:
        total = 0.0
        for inputs, labels_BS in cases:
            hidden = self.model.hidden_states(inputs.tokens_BS, mask=inputs.mask, valid_BS=inputs.valid_BS, mtp=False)
            loss = linear_cross_entropy(hidden.main_BSD.flatten(0, 1), self.model.lm_head.weight, labels_BS.flatten())
            total += float(loss)
        return total

    def sum_counts(self, counts_LE: Tensor) -> Tensor:
        return self._ranks.sum_counts(counts_LE)

    def all_loads(self, loads: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: counts_E.cpu() for name, counts_E in loads.items()}

    def sample(self, data: PreparedData) -> Sample | None:
        return draw_sample(self.model, data, self._config)

    def _forward(self, inputs: Sequence[PassInput]) -> None:
        for one in inputs:
            self.model.hidden_states(one.tokens_BS, mask=one.mask, valid_BS=one.valid_BS)


class Pipelined(Execution):
    """Every process has some stages, as the schedule places them. `model` keeps the rank's part of the whole one."""

    model: RankModel
    can_sample = False  # generation wants all layers at once

    def __init__(
        self, model: Transformer, config: TrainConfig, ranks: Ranks, tokenizer: Tokenizer, dtype: torch.dtype
    ) -> None:
        super().__init__(config, ranks, tokenizer)
        mesh = ranks.mesh
        parts = planned_stages(config, model.config, pp=mesh.pp.size, data_ranks=mesh.data.size)
        model.recompute = config.recompute
        self.pipeline = Pipeline(model, parts, mesh, schedule=config.schedule, overlap=config.overlap)
        self.model = self.pipeline.model
        self._order = module_names(model)
        distribute_experts(self.model, mesh)
        lender = Lender()
        sharding = shard_parameters(self.model, mesh, dtype, lender.divide)
        self.sharding = PipelineSharding(sharding, self.pipeline, mesh)
        self.pipeline.compute_with(lender.lend, dtype)
        cast_whole(self.model, dtype, sharding)
        self.model.to_empty(device=mesh.device)

    def backward_step(
        self, balancer: LoadBalancer, tokens_BS1: Tensor, plan: Step, observe: Observe | None = None
    ) -> Losses:
        """As in `Execution`; a step of `timeline_steps` leaves its timeline in the run's folder."""
        spans: list[Span] = []
        recorded = plan.number in self._config.timeline_steps
        record = spans.append if recorded else None
        losses = pipelined_backward_step(
            self.pipeline, balancer, tokens_BS1, observe=observe, record=record, **self._settings(plan)
        )
        if recorded:
            self._ranks.together(lambda: self._save_timeline(plan.number, spans))
        return losses

    def nats(self, cases: Iterable[Case]) -> float:
        total, cases = torch.zeros(1, dtype=torch.float64), iter(cases)
        # A few at a time: what the first stage has sent ahead waits in memory.
        while group := list(itertools.islice(cases, 2 * len(self.pipeline.parts))):
            self.pipeline.evaluate([inputs for inputs, _ in group], _summing([labels for _, labels in group], total))
        return float(self.pipeline.sum_(total))

    def sum_counts(self, counts_LE: Tensor) -> Tensor:
        return self._ranks.sum_counts(self.pipeline.sum_counts(counts_LE))

    def all_loads(self, loads: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        names = routed_layers(self.model.config)
        counts_LE = torch.zeros(len(names), self.model.config.n_routed_experts, dtype=torch.int64)
        for row_E, name in zip(counts_LE, names, strict=True):
            if name in loads and self.pipeline.owns(name):
                row_E.copy_(loads[name])
        return dict(zip(names, self.pipeline.sum_(counts_LE), strict=True))

    def activity(self) -> str | None:
        return self.pipeline.activity()

    def sample(self, data: PreparedData) -> Sample | None:
        return None

    def _forward(self, inputs: Sequence[PassInput]) -> None:
        self.pipeline.evaluate(inputs, lambda hiddens, head_VD, micro_batch: hiddens[0].sum(), mtp=True)

    def _first(self, found: str | None) -> str | None:
        return self._by_place(found, min)

    def _last(self, found: str | None) -> str | None:
        return self._by_place(found, max)

    def _by_place(self, found: str | None, choose: Callable[[list[tuple[int, int]]], tuple[int, int]]) -> str | None:
        """Of what processes found, what `choose` takes by the order of the model's modules, with whose it is."""
        texts = self._ranks.gather_texts(found or "")
        places = [(self._place(text), rank) for rank, text in enumerate(texts) if text]
        if not places:
            return None
        _, rank = choose(places)
        axis = self.pipeline.axis
        stages = self.pipeline.schedule(2 * axis.size).stages[rank // self._ranks.mesh.data.size]
        return f"{texts[rank]} on rank {rank}, pipeline stage {' and '.join(map(str, stages))}"

    def _place(self, text: str) -> int:
        """Which of the model's modules, in order, a text that ends in a name speaks of."""
        name = text.split()[-1] + "."
        return next(i for i, module in enumerate(self._order) if name.startswith(f"{module}."))

    def _save_timeline(self, step: int, spans: Sequence[Span]) -> None:
        mesh = self._ranks.mesh
        if mesh.data.index == 0:
            chunks = 1 + max(op.micro_batch for span in spans for op in span.step.parts)
            save_spans(self._config.out, step, self.pipeline.schedule(chunks), mesh.pp.index, spans)


def make_execution(
    model: Transformer, config: TrainConfig, ranks: Ranks, tokenizer: Tokenizer, dtype: torch.dtype
) -> Execution:
    """Divide a model among the processes; `UserError` if it cannot be.

    model: in FP32, on the meta device. What a process holds of it comes to be, but has no values yet. dtype: what it
    will compute in.
    """
    kind = Pipelined if ranks.mesh.pp.size > 1 else WholeModel
    return kind(model, config, ranks, tokenizer, dtype)


def _summing(labels: Sequence[Tensor], total: Tensor) -> Callable[[tuple[Tensor, ...], Tensor, int], Tensor]:
    """A pipeline's loss function that adds what it says to `total`."""

    def loss(hiddens: tuple[Tensor, ...], head_VD: Tensor, micro_batch: int) -> Tensor:
        nats = linear_cross_entropy(hiddens[0].flatten(0, 1), head_VD, labels[micro_batch].flatten())
        total.add_(nats.double().cpu())
        return nats

    return loss
