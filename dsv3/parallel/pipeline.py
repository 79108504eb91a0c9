"""A training step over a pipeline of ranks: runs any schedule of `dsv3.plan.schedules`, operation by operation.

One executor for all of them, and of our own. The same `Schedule` value that the planner simulates says what each rank
does; here an operation is real. torch's pipelining can run the same stages (a test has it do so), but only without MTP,
which wants the tokens again at the end, with every stage on one rank, and with the two chunks of a pair one after the
other; what DualPipe is about would have gone around it.

A parameter that several ranks hold (DualPipe's copies; the embedding where MTP is elsewhere) gets its gradient summed
over them, once per step, by `sum_gradients`.

Shapes: B batch, S tokens, P positions travelling (`dsv3.parallel.stages`), D model.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.errors import UserError
from dsv3.model.context import make_context, whole_sequences
from dsv3.model.router import Routing
from dsv3.model.transformer import Recompute, Transformer
from dsv3.parallel.layout import StagePart
from dsv3.parallel.mail import Groups, Mail, Message, links, sender
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.overlap import interleave
from dsv3.parallel.pieces import Chunk, drain
from dsv3.parallel.stages import (
    Loss,
    RankModel,
    Stage,
    StagePass,
    holders,
    module_names,
    payload_positions,
)
from dsv3.parallel.tape import Lend, Tape, always_there, map_tensors, slot_of
from dsv3.plan.pipeline import Span
from dsv3.plan.schedules import Op, OverlappedPair, Schedule, make_schedule


@dataclass(frozen=True)
class PassInput:
    """What enters the pipeline as one chunk; `mask` and `valid_BS` as in `Context`."""

    tokens_BS: Tensor
    mask: Tensor | None = None
    valid_BS: Tensor | None = None


Observer = Callable[[Span], None]
"""Told of each operation with its start and end, in seconds by `time.perf_counter`; waiting for input is not in it."""


class Pipeline:
    """This rank's stages of a model and its place among the other ranks; `step` runs one optimizer step's chunks.

    parts: the whole layout, one entry per stage. schedule: a method of `dsv3.plan.schedules`; with Interleaved1F1B the
    number of stages says how many each rank has. model: the whole model, of which the rank keeps its part
    (`self.model`); it may be on the meta device except for that part.
    overlap: run the two chunks of a pair in turns (`dsv3.parallel.overlap`) and not one after the other.
    """

    def __init__(
        self,
        model: Transformer,
        parts: Sequence[StagePart],
        mesh: Mesh,
        *,
        schedule: str = "DualPipe",
        overlap: bool = False,
    ) -> None:
        axis = mesh.pp
        self.parts, self.axis, self.overlap = tuple(parts), axis, overlap
        self.recompute: Recompute = model.recompute
        self._method = schedule
        self._lend: Lend = always_there
        self._dtype: torch.dtype | None = None  # of what travels; None: that of the weights
        self._at: tuple[Schedule, int, bool] | None = None  # while running: the step, and whether its input is here
        # Where stages sit depends on the ranks alone; any number of chunks that every method can run tells it.
        sample = self.schedule(2 * axis.size)
        self._ranks = [[self.parts[stage] for stage in stages] for stages in sample.stages]
        self.model = RankModel(model, self._ranks[axis.index])
        self._stages = {stage: Stage(self.model, self.parts[stage]) for stage in sample.stages[axis.index]}
        shared = {h for h in map(self.holders, module_names(model)) if len(h) > 1}
        self._groups = Groups(mesh, links(sample), shared)

    def compute_with(self, lend: Lend, dtype: torch.dtype) -> None:
        """From now on have weights from `lend`, in `dtype`: those in `self.model` are what this rank keeps of them."""
        self._lend, self._dtype = lend, dtype

    def schedule(self, num_chunks: int) -> Schedule:
        """What the ranks do in a step of `num_chunks` micro-batches; `UserError` if the method cannot run as many."""
        return schedule_over(self.parts, self.axis.size, self._method, num_chunks)

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks of the pipeline that hold this parameter or buffer. The first one speaks for it."""
        return holders(name, self._ranks)

    def owns(self, name: str) -> bool:
        """Whether this rank counts, saves and reports this parameter, so that it is done once."""
        return self.holders(name)[0] == self.axis.index

    def step(
        self,
        micro_batches: Sequence[PassInput],
        loss: Loss,
        observe: Callable[[dict[str, Routing], int], None],
        *,
        aux_loss_scale: float = 0.0,
        mtp: bool = True,
        record: Observer | None = None,
    ) -> None:
        """Forward and backward of all micro-batches; gradients add up in the parameters of `self.model`.

        micro_batches: the same list on every rank; the number of sequences may differ. `loss` is called on
        the ranks with the last stage, `observe` with the routings and the micro-batch of every forward. To be followed
        by `sum_gradients`.
        """
        schedule = self.schedule(len(micro_batches))
        self._run(schedule, _Work(micro_batches, loss, aux_loss_scale, mtp), observe, record)
        self._touch_embedding(mtp)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[PassInput], loss: Loss, *, mtp: bool = False) -> None:
        """Forward passes only, of any number of micro-batches; `loss` as in `step`, what it returns is not used."""
        schedule = forward_only(self.schedule(2 * self.axis.size), len(micro_batches))
        self._run(schedule, _Work(micro_batches, loss, 0.0, mtp), None, None)

    def activity(self) -> str | None:
        """Which operation this rank is at, and from whom it waits for what, in words; None between schedules."""
        at = self._at
        if at is None:
            return None
        schedule, number, arrived = at
        steps = schedule.ranks[self.axis.index]
        if number == len(steps):
            return f"the end of its {len(steps)} operations, waiting until what it sent has arrived"
        parts = steps[number].parts
        text = f"operation {number + 1} of {len(steps)}, " + " with ".join(map(_in_words, parts))
        if arrived:
            return text
        waits = [
            f"{'activations' if op.kind == 'F' else 'a gradient'} from rank {self.axis.ranks[source]}"
            for op in parts
            if (source := sender(schedule, op)) is not None and source != self.axis.index
        ]
        return text + (f", waiting for {' and '.join(waits)}" if waits else "")

    def _run(
        self,
        schedule: Schedule,
        work: _Work,
        observe: Callable[[dict[str, Routing], int], None] | None,
        record: Observer | None,
    ) -> None:
        rank = self.axis.index
        mail = Mail(schedule, rank, self._groups, partial(self._buffer, work))
        passes: dict[tuple[int, int], StagePass] = {}
        for number, step in enumerate(schedule.ranks[rank]):
            self._at = schedule, number, False
            arrived = [mail.receive(op) for op in step.parts]
            self._at = schedule, number, True
            started = time.perf_counter()
            chunks: list[Chunk[Any]] = [
                self._forward(op, x, work) if op.kind == "F" else _backward(op, x, passes)
                for op, x in zip(step.parts, arrived, strict=True)
            ]
            overlapped = self.overlap and isinstance(step, OverlappedPair)
            results = interleave(chunks) if overlapped else [drain(chunk) for chunk in chunks]
            if record is not None:
                _synchronize(work.micro_batches[0].tokens_BS)
                record(Span(step, started, time.perf_counter()))
            for op, result in zip(step.parts, results, strict=True):
                if op.kind == "F":
                    if observe is not None:
                        observe(map_tensors(Tensor.detach, result.routings), op.micro_batch)
                    if torch.is_grad_enabled():
                        passes[op.stage, op.micro_batch] = result
                    result = result.output
                mail.send(op, result)
        self._at = schedule, len(schedule.ranks[rank]), True
        mail.finish()
        self._at = None

    def close(self) -> None:
        """Give back the process groups: each has connections and threads. All processes do so at the same place."""
        self._groups.close()

    def sum_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum, in place, the gradients of parameters that other ranks of the pipeline hold too; by parameter name."""
        works = []
        for name, gradient in gradients.items():
            if (group := self._groups.of(self.holders(name))) is not None:
                works.append(dist.all_reduce(gradient, group=group, async_op=True))
        for work in works:
            work.wait()

    def sum_(self, tensor: Tensor) -> Tensor:
        """A CPU tensor summed over the pipeline's ranks, in place."""
        device = next(self.model.parameters()).device
        return tensor.copy_(self.axis.sum_(tensor.to(device)))

    def sum_counts(self, counts_LE: Tensor) -> Tensor:
        """The balancer's counts of this rank's layers, summed over the ranks that hold the same layers. In place."""
        routers = [name for name, _ in self.model.named_parameters() if name.endswith(".router.weight")]
        if routers and (group := self._groups.of(self.holders(routers[0]))) is not None:
            dist.all_reduce(counts_LE, group=group)
        return counts_LE

    def _forward(self, op: Op, arrived: Tensor | None, work: _Work) -> Chunk[StagePass]:
        inputs = work.micro_batches[op.micro_batch]
        context = make_context(
            self.model.config,
            whole_sequences(inputs.tokens_BS.shape[1]),
            inputs.tokens_BS.device,
            mask=inputs.mask,
            valid_BS=inputs.valid_BS,
            aux_loss_scale=work.aux_loss_scale,
        )
        return self._stages[op.stage].forward(
            Tape(self.recompute, self._lend),
            arrived,
            inputs.tokens_BS,
            context,
            lambda hiddens, head_VD: work.loss(hiddens, head_VD, op.micro_batch),
            mtp=work.mtp,
            in_stages=self.overlap,
        )

    def _buffer(self, work: _Work, message: Message) -> Tensor:
        """Room for a message to this rank."""
        kind, stage, micro_batch = message
        B, S = work.micro_batches[micro_batch].tokens_BS.shape
        # A gradient is shaped like what this stage had sent to the next.
        positions = payload_positions(self.parts[stage + (kind == "B")], S, mtp=work.mtp)
        weights = (p for name, p in self.model.named_parameters() if ".router." not in name)
        return next(weights).new_empty(B, positions, self.model.config.hidden_size, dtype=self._dtype)

    def _touch_embedding(self, mtp: bool) -> None:
        """Without MTP its copy of the embedding was not used: give it a zero gradient, for the sum over the copies."""
        parts = self._ranks[self.axis.index]
        if not mtp and self.model.embed_tokens is not None and not any(part.embedding for part in parts):
            weight = self.model.embed_tokens.weight
            torch.autograd.backward([weight], [torch.zeros_like(weight)])


def schedule_over(parts: Sequence[StagePart], num_ranks: int, method: str, num_chunks: int) -> Schedule:
    """The schedule of `method` for these stages. Raises `UserError` if it has other stages or cannot run so many."""
    if len(parts) % num_ranks:
        raise UserError(f"the layout has {len(parts)} stages, expected a multiple of the {num_ranks} pipeline ranks")
    schedule = make_schedule(method, num_ranks, num_chunks, stages_per_rank=len(parts) // num_ranks)
    if schedule.num_stages != len(parts):
        raise UserError(
            f"{schedule.name} on {num_ranks} ranks has {schedule.num_stages} stages, but the layout has {len(parts)}"
        )
    return schedule


def forward_only(schedule: Schedule, num_chunks: int) -> Schedule:
    """The forward operations alone, for any number of micro-batches, on the stages of `schedule`.

    Every rank runs its operations in one order that all agree on and that has what an operation needs before it.
    """
    empty = dataclasses.replace(schedule, num_chunks=num_chunks, ranks=())
    ranks: list[list[Op]] = [[] for _ in schedule.stages]
    half = num_chunks // 2 if schedule.bidirectional else num_chunks
    for micro_batch in sorted(range(num_chunks), key=lambda m: m % half if half else m):  # both ends in turn
        for stage in range(schedule.num_stages):
            ranks[empty.rank_of(stage, micro_batch)].append(Op("F", stage, micro_batch))
    return dataclasses.replace(empty, ranks=tuple(map(tuple, ranks)))


@dataclass(frozen=True)
class _Work:
    """What a run over a schedule is about, the same for all its operations."""

    micro_batches: Sequence[PassInput]
    loss: Loss
    aux_loss_scale: float
    mtp: bool


def _in_words(op: Op) -> str:
    kind = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradients"}[op.kind]
    return f"{op.kind} ({kind}) of micro-batch {op.micro_batch} of stage {op.stage}"


def _backward(op: Op, gradient: Tensor | None, passes: dict[tuple[int, int], StagePass]) -> Chunk[Tensor | None]:
    """Returns the gradient of what had arrived, None where no stage waits for it. Ends the pass unless W is to come."""
    key = op.stage, op.micro_batch
    forward = passes[key] if op.kind == "I" else passes.pop(key)
    if op.kind == "W":
        forward.tape.backward_weights()
        return None
    slot_of(forward.output).add(torch.ones_like(forward.output) if gradient is None else gradient)
    yield from forward.tape.backward(split=op.kind == "I")
    return None if forward.arrived is None else slot_of(forward.arrived).grad


def _synchronize(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
