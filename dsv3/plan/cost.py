"""`plan cost`: GPU hours and money of a training run, and what utilisation a speed amounts to.

    GPU hours = tokens / (tokens per second and GPU x 3600)
    MFU       = tokens per second and GPU x training FLOPs per token / peak FLOP/s

MFU is only a number once it is said which FLOPs and which peak. Here it means, unless said otherwise: causal
attention, MTP not counted, the dense BF16 peak. Those are the terms of the training table in "Insights into
DeepSeek-V3" (arXiv 2505.09343, table 4), whose 272.80B tokens a day on 2,048 H800 come out at its 38.94 % within
0.2 points; `utilisation` gives the others beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.plan.display import Plan, short, table
from dsv3.plan.hardware import GPU, find_gpu
from dsv3.plan.model import count_flops, plan_model


@dataclass(frozen=True)
class Utilisation:
    """One speed under one way of counting FLOPs."""

    counting: str
    flops_per_token: float
    flops_per_second: float  # of one GPU
    mfu_bf16: float
    mfu_fp8: float | None  # None: the GPU has no FP8


@dataclass(frozen=True)
class CostItem:
    """One stage of a run."""

    stage: str
    gpu_hours: float
    dollars: float
    days: float


@dataclass(frozen=True)
class TrainingCost(Plan):
    """Stages in order; `days` is wall-clock time on `gpus` GPUs, without restarts."""

    gpu: str
    gpus: int
    dollars_per_hour: float
    tokens: float
    stages: tuple[CostItem, ...]
    gpu_hours: float
    dollars: float
    days: float
    gpu_hours_per_trillion: float
    days_per_trillion: float
    tokens_per_second_per_gpu: float
    utilisation: tuple[Utilisation, ...]  # of pre-training


def plan_cost(
    config: ModelConfig,
    gpu: GPU,
    *,
    tokens: float,
    gpus: int,
    dollars_per_hour: float,
    context: int = 4096,
    mfu: float | None = None,
    tokens_per_second_per_gpu: float | None = None,
    gpu_hours_per_trillion: float | None = None,
    other_gpu_hours: Mapping[str, float] | None = None,
) -> TrainingCost:
    """Cost of `tokens` tokens of pre-training, plus stages whose GPU hours are given in `other_gpu_hours`.

    How fast a GPU trains is given as exactly one of: `mfu` (assumed; see the module's head for what it means),
    `tokens_per_second_per_gpu` (measured), `gpu_hours_per_trillion` tokens (published).
    Raises `UserError` if none or several are given, or a value is not positive.
    """
    rates = {
        "mfu": mfu,
        "tokens_per_second_per_gpu": tokens_per_second_per_gpu,
        "gpu_hours_per_trillion": gpu_hours_per_trillion,
    }
    given = {name: value for name, value in rates.items() if value is not None}
    if len(given) != 1:
        raise UserError(f"{' and '.join(given) or 'no speed'} given, expected exactly one of {', '.join(rates)}")
    others = dict(other_gpu_hours or {})
    if "pre-training" in others:
        raise UserError("other_gpu_hours names 'pre-training', which follows from the tokens; give only other stages")
    positive = {**given, "tokens": tokens, "gpus": gpus, "dollars_per_hour": dollars_per_hour, **others}
    for name, value in positive.items():
        if not 0 < value < float("inf"):
            raise UserError(f"{name} is {value}, expected a finite number above 0")
    if mfu is not None:
        if mfu > 1:
            raise UserError(f"mfu is {mfu}, expected a share of the peak: 0.39 for 39 %")
        speed = mfu * gpu.bf16_flops / count_flops(config, context).training
    elif gpu_hours_per_trillion is not None:
        speed = 1e12 / (gpu_hours_per_trillion * 3600)
    else:
        assert tokens_per_second_per_gpu is not None
        speed = tokens_per_second_per_gpu

    hours = {"pre-training": tokens / speed / 3600, **others}
    stages = tuple(CostItem(name, h, h * dollars_per_hour, h / gpus / 24) for name, h in hours.items())
    per_trillion = 1e12 / speed / 3600
    return TrainingCost(
        gpu=gpu.name,
        gpus=gpus,
        dollars_per_hour=dollars_per_hour,
        tokens=tokens,
        stages=stages,
        gpu_hours=sum(stage.gpu_hours for stage in stages),
        dollars=sum(stage.dollars for stage in stages),
        days=sum(stage.days for stage in stages),
        gpu_hours_per_trillion=per_trillion,
        days_per_trillion=per_trillion / gpus / 24,
        tokens_per_second_per_gpu=speed,
        utilisation=utilisation(config, gpu, speed, context=context),
    )


def report_costs() -> TrainingCost:
    """The DeepSeek-V3 report's table 1, from what it states.

    180K H800 hours per trillion tokens for 14.8T tokens, 119K hours of context extension, 5K of post-training,
    2,048 GPUs at $2 an hour.
    """
    return plan_cost(
        ModelConfig.preset("v3-671b"),
        find_gpu("H800"),
        tokens=14.8e12,
        gpus=2048,
        dollars_per_hour=2.0,
        gpu_hours_per_trillion=180e3,
        other_gpu_hours={"context extension": 119e3, "post-training": 5e3},
    )


def utilisation(
    config: ModelConfig, gpu: GPU, tokens_per_second_per_gpu: float, *, context: int = 4096
) -> tuple[Utilisation, ...]:
    """What share of the peaks a training speed is, under each usual way of counting FLOPs.

    "6 N" is six per activated parameter (head included, embedding not), without any attention over keys.
    """
    flops = count_flops(config, context)
    countings = {
        "causal attention": flops.training,
        "full attention": flops.training_full_attention,
        "causal attention, with MTP": flops.training + flops.mtp_training,
        "6 N": 6 * plan_model(config, context=context).activated_with_head,
    }
    out = []
    for name, per_token in countings.items():
        rate = per_token * tokens_per_second_per_gpu
        fp8 = None if gpu.fp8_flops is None else rate / gpu.fp8_flops
        out.append(Utilisation(name, per_token, rate, rate / gpu.bf16_flops, fp8))
    return tuple(out)


def render(plan: TrainingCost) -> RenderableType:
    """The plan as tables."""
    rows = [(s.stage, f"{s.gpu_hours:,.0f}", f"${s.dollars:,.0f}", f"{s.days:.1f}") for s in plan.stages]
    rows.append(("total", f"{plan.gpu_hours:,.0f}", f"${plan.dollars:,.0f}", f"{plan.days:.1f}"))
    speed = (
        f"{plan.tokens_per_second_per_gpu:,.0f} tokens/s a GPU; {plan.gpu_hours_per_trillion:,.0f} GPU hours "
        f"({plan.days_per_trillion:.1f} days) per trillion tokens"
    )
    return Group(
        table(
            f"{short(plan.tokens)} tokens on {plan.gpus:,} {plan.gpu} at ${plan.dollars_per_hour:g} an hour",
            ("stage", "GPU hours", "cost", "days"),
            rows,
            speed,
        ),
        table(
            "Utilisation of pre-training, by how FLOPs are counted",
            ("counting", "a token", "a GPU", "of BF16 peak", "of FP8 peak"),
            [
                (
                    u.counting,
                    short(u.flops_per_token, "FLOP"),
                    short(u.flops_per_second, "FLOP/s"),
                    f"{u.mfu_bf16:.2%}",
                    "-" if u.mfu_fp8 is None else f"{u.mfu_fp8:.2%}",
                )
                for u in plan.utilisation
            ],
        ),
    )
