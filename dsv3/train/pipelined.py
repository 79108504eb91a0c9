"""`backward_step` over a pipeline: the same losses, counts and weights, made where the last stage is.

And before a run begins: whether its pipeline can run its steps at all.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.model.balance import LoadBalancer
from dsv3.model.router import Routing
from dsv3.parallel.layout import StagePart, balanced_layout, parse_layout
from dsv3.parallel.pipeline import Observer, Pipeline, schedule_over
from dsv3.plan.schedules import make_schedule
from dsv3.train.config import TrainConfig
from dsv3.train.step import Losses, Observe, StepLosses, StepSettings
from dsv3.train.timetable import timetable


def planned_stages(config: TrainConfig, model: ModelConfig, *, pp: int, data_ranks: int) -> tuple[StagePart, ...]:
    """The stages of a run over `pp` ranks, `data_ranks` of such pipelines beside each other.

    Raises `UserError` if the layout does not fit the model or the schedule, or if the schedule cannot run as many
    micro-batches as a step has.
    """
    if config.layout is None:
        stages = make_schedule(config.schedule, pp, 2 * pp).num_stages
        parts = balanced_layout(model, stages, context=config.seq_len)
    else:
        parts = parse_layout(config.layout, model)
    for sequences in sorted({step.sequences for step in timetable(config)}):
        share = -(-sequences // data_ranks)
        micro_batches = -(-share // (config.micro_batch_size or sequences))
        try:
            schedule_over(parts, pp, config.schedule, micro_batches)
        except UserError as error:
            raise UserError(
                f"a pipeline of {pp} ranks cannot run a step of {sequences} sequences, which has {micro_batches} "
                f"micro-batches (chunks): {error}; change batch_size, micro_batch_size, layout or schedule"
            ) from None
    return parts


def pipelined_backward_step(
    pipeline: Pipeline,
    balancer: LoadBalancer,
    tokens_BS1: Tensor,
    *,
    observe: Observe | None = None,
    record: Observer | None = None,
    **settings: Unpack[StepSettings],
) -> Losses:
    """Forward and backward of a whole step through the pipeline; gradients add up in `pipeline.model`.

    tokens_BS1: the sequences of this pipeline, the same on all its ranks; the other arguments and the losses as in
    `backward_step`. Gradients of parameters that several ranks hold have still to be summed
    (`pipeline.sum_gradients`), as those of data-parallel ranks have. Raises `UserError` if the schedule cannot run so
    many micro-batches.
    """
    step = StepLosses(pipeline.model.config, tokens_BS1, **settings)

    def observe_all(routings: dict[str, Routing], micro_batch: int) -> None:
        balancer.observe(routings)
        step.observe(routings, micro_batch)
        if observe is not None:
            observe(routings, micro_batch)

    pipeline.step(
        list(step.inputs()), step.loss, observe_all, aux_loss_scale=step.aux_loss_scale, mtp=step.mtp, record=record
    )
    return step.means(pipeline.sum_)
