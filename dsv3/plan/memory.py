"""`plan memory`: what each pipeline rank holds while it trains, under any layout.

Bytes per parameter, of the share that a rank holds (report, section 3.3.3: gradients are accumulated and master
weights kept in FP32; Adam's moments are BF16 there, FP32 in this package's optimizer):

| precision | weight | gradient | master weight | two moments |
|---|---|---|---|---|
| fp32 | 4 | 4 | - | 8 |
| bf16 | 2 | 4 | 4 | 4 (BF16) or 8 (FP32) |
| fp8 | matrices 1 + 4/128^2, the rest 2 | 4 | 4 | 4 or 8 |

A rank's parameters are those of its pipeline stage, routed experts divided by EP. Copies over which ZeRO may
divide: gpus / PP of everything, gpus / (PP x EP) of the experts; twice that under DualPipe, which holds every stage
on two ranks. ZeRO 1 divides master weights and moments, 2 gradients as well, 3 weights too (then two blocks' weights
and one block's gradient are whole at a time).

Micro-batches in flight, each keeping its stage's `saved_activations`: stage s of S holds S - s under 1F1B, S under
ZB1P; DualPipe's rank r has stages r and S-1-r with S - r and r + 1 of them, together S + 1 (report, table 2);
DualPipeV does the same with S = 2 x ranks stages and one copy of the parameters. Fewer micro-batches than that per
step hold less: this is the steady state.

Not counted: CUDA context, communication buffers, fragmentation. Leave room for them (`plan fit` keeps 10 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.plan.activations import (
    Precision,
    Recompute,
    check_choice,
    head_activations,
    head_gradient_bytes,
    saved_activations,
)
from dsv3.plan.display import Plan, gib, short, table
from dsv3.plan.model import FP8_BLOCK, block_linears, block_parameters, embedding_parameters

Schedule = Literal["1f1b", "zb1p", "dualpipe", "dualpipev"]
Moments = Literal["bf16", "fp32"]

_HEAD_CHUNK_BYTES = 64 << 20  # FP32 logits of one chunk of tokens (32 MiB), and their BF16 copies


@dataclass(frozen=True)
class Layout:
    """How a training step is laid out: sizes of the parallel dimensions, and what each rank keeps."""

    gpus: int = 1
    pipeline: int = 1  # PP: ranks in a pipeline
    expert: int = 1  # EP: ranks that share the routed experts of a layer, inside the data-parallel ranks
    zero: int = 1  # ZeRO stage, 0 to 3
    schedule: Schedule = "1f1b"
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    moments: Moments = "fp32"  # what this package's optimizer keeps; the report's are BF16
    micro_batch: int = 1  # sequences
    sequence_length: int = 4096
    imbalance: float = 1.0  # expert rows of EP's busiest rank relative to the mean; 1 is perfect balance

    @property
    def data(self) -> int:
        """Data-parallel ranks: copies of the non-expert parameters, and streams of micro-batches."""
        return self.gpus // self.pipeline

    @property
    def copies(self) -> tuple[int, int]:
        """Ranks that hold one and the same (non-expert parameter, expert): those over which ZeRO may divide."""
        dense = self.data * (2 if self.schedule == "dualpipe" else 1)
        return dense, dense // self.expert

    @property
    def stages(self) -> int:
        """Pieces the model is cut into."""
        return 2 * self.pipeline if self.schedule == "dualpipev" else self.pipeline

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that pipeline rank `rank` holds."""
        if self.schedule in ("dualpipe", "dualpipev"):
            return (rank, self.stages - 1 - rank)
        return (rank,)

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations a rank keeps for `stage`, at the peak."""
        return self.stages if self.schedule == "zb1p" else self.stages - stage

    def check(self, config: ModelConfig) -> None:
        """Raise `UserError` if `config` cannot be laid out so, saying what would work."""
        for name, choices in (("schedule", Schedule), ("recompute", Recompute), ("precision", Precision)):
            check_choice(name, getattr(self, name), choices)
        check_choice("moments", self.moments, Moments)
        for name in ("gpus", "pipeline", "expert", "micro_batch", "sequence_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise UserError(f"zero is {self.zero}, expected a ZeRO stage from 0 to 3")
        if not 1 <= self.imbalance < float("inf"):
            raise UserError(
                f"imbalance is {self.imbalance}, expected the busiest rank's load over the mean, at least 1"
            )
        if self.gpus % self.pipeline:
            raise UserError(f"pipeline is {self.pipeline}, expected a divisor of the {self.gpus} GPUs")
        if self.data % self.expert or config.n_routed_experts % self.expert:
            raise UserError(
                f"expert is {self.expert}, expected a divisor of both the {self.data} data-parallel ranks and the "
                f"{config.n_routed_experts} routed experts"
            )
        if self.schedule in ("dualpipe", "dualpipev") and self.pipeline % 2:
            raise UserError(f"pipeline is {self.pipeline}, {self.schedule} needs an even number of ranks")
        most = config.num_hidden_layers + min(config.num_nextn_predict_layers, 1)
        if self.stages > most:
            raise UserError(
                f"{self.schedule} on {self.pipeline} ranks cuts the model into {self.stages} stages, but its blocks "
                f"fill only {most}: take fewer pipeline ranks"
            )


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one pipeline rank (all its data- and expert-parallel peers hold as much)."""

    rank: int
    blocks: tuple[int, ...]  # MTP modules count on from num_hidden_layers
    # weights, gradients, master weights, moments, activations, and "working": one block run again, ZeRO 3's whole
    # blocks, the chunk of the cross-entropy
    parts: dict[str, float]
    total: float


@dataclass(frozen=True)
class MemoryPlan(Plan):
    """`ranks` by pipeline rank; the fullest one decides."""

    layout: Layout
    ranks: tuple[RankMemory, ...]
    fullest_rank: int
    fullest_bytes: float
    saved_per_token: dict[str, dict[str, float]]  # bytes a token leaves behind in a "dense" and a "moe" block, by kind


def plan_memory(config: ModelConfig, layout: Layout) -> MemoryPlan:
    """What every pipeline rank of `layout` holds. Raises `UserError` if the layout is impossible."""
    layout.check(config)
    stages = split_blocks(config, layout.stages)
    # Blocks differ only in being dense or MoE, and the main model's or an MTP module's.
    kind = [(config.is_moe_layer(i), i >= config.num_hidden_layers) for i in range(config.num_layers_with_mtp)]
    sizes = {key: _block(config, layout, kind.index(key)) for key in set(kind)}
    blocks = [sizes[key] for key in kind]
    ranks = tuple(_rank_memory(config, layout, rank, stages, blocks) for rank in range(layout.pipeline))
    fullest = max(ranks, key=lambda rank: rank.total)
    saved = {
        "moe" if moe else "dense": saved_activations(
            config, kind.index((moe, mtp)), precision=layout.precision, recompute=layout.recompute
        )
        for moe, mtp in sorted(sizes)
        if not mtp
    }
    return MemoryPlan(layout, ranks, fullest.rank, fullest.total, saved)


def split_blocks(config: ModelConfig, stages: int) -> list[range]:
    """Blocks (MTP modules after the main model's) cut into `stages` runs, as equal as can be.

    If they are unequal the shorter runs are the last and the first, then inwards: those carry head and embedding.
    All MTP modules lie on the last stage, because they need the hidden state of the whole main model.
    """
    blocks, mtp = config.num_layers_with_mtp, config.num_nextn_predict_layers
    if blocks // stages < mtp and stages > 1:
        return [*_runs(config.num_hidden_layers, stages - 1), range(config.num_hidden_layers, blocks)]
    return _runs(blocks, stages)


def _runs(blocks: int, stages: int) -> list[range]:
    base, longer = divmod(blocks, stages)
    inwards = [stage for pair in zip(reversed(range(stages)), range(stages), strict=True) for stage in pair]
    shorter = set(list(dict.fromkeys(inwards))[: stages - longer])
    out, start = [], 0
    for stage in range(stages):
        end = start + base + (stage not in shorter)
        out.append(range(start, end))
        start = end
    return out


@dataclass(frozen=True)
class _Block:
    """One block on one rank: parameters, and bytes of a micro-batch."""

    dense_fp8: float  # matrices that FP8 may hold, outside the routed experts
    dense_other: float
    experts: float  # routed, this rank's share
    saved: float  # activations kept for the backward pass
    recomputed: float  # activations made again in the backward pass


def _block(config: ModelConfig, layout: Layout, layer: int) -> _Block:
    fp8 = sum(x.parameters for x in block_linears(config, layer) if x.fp8 and x.part != "routed experts")
    parts = block_parameters(config, layer)
    experts = parts.pop("routed experts", 0) / layout.expert

    def saved(recompute: Recompute) -> float:
        sizes = saved_activations(config, layer, precision=layout.precision, recompute=recompute)
        # What lies in expert rows grows with the busiest rank; a shared expert's part of the SwiGLU does not.
        routed = config.num_experts_per_tok / (config.num_experts_per_tok + config.n_shared_experts)
        rows = sizes.get("rows", 0) + sizes.get("expert output", 0)
        rows += routed * (sizes.get("SwiGLU input", 0) + sizes.get("SwiGLU output", 0))
        excess = (layout.imbalance - 1) * rows if config.is_moe_layer(layer) and layout.expert > 1 else 0
        return layout.micro_batch * layout.sequence_length * (sum(sizes.values()) + excess)

    kept = saved(layout.recompute)
    return _Block(fp8, sum(parts.values()) - fp8, experts, kept, saved("none") - kept)


def _rank_memory(
    config: ModelConfig, layout: Layout, rank: int, stages: list[range], blocks: list[_Block]
) -> RankMemory:
    mine, last = layout.stages_of(rank), layout.stages - 1
    numbers = tuple(layer for stage in mine for layer in stages[stage])
    here = [blocks[layer] for layer in numbers]
    matrices, experts = sum(block.dense_fp8 for block in here), sum(block.experts for block in here)
    others = sum(block.dense_other for block in here)
    if 0 in mine or (last in mine and config.num_nextn_predict_layers):
        others += embedding_parameters(config)  # MTP needs the embedding beside the head
    if last in mine:
        others += embedding_parameters(config) + config.hidden_size

    dense_copies, expert_copies = layout.copies

    def states(dense_bytes: float, expert_bytes: float, divided_from: int) -> float:
        if layout.zero >= divided_from:
            return dense_bytes / dense_copies + expert_bytes / expert_copies
        return dense_bytes + expert_bytes

    def per_parameter(size: float, divided_from: int) -> float:
        return states(size * (matrices + others), size * experts, divided_from)

    tokens = layout.micro_batch * layout.sequence_length
    activations = sum(layout.in_flight(stage) * sum(blocks[i].saved for i in stages[stage]) for stage in mine)
    working = max(block.recomputed for block in here)
    if layout.zero == 3:
        working += max(_gathered_bytes(layout, block) for block in here)
    if last in mine:
        heads = 1 + config.num_nextn_predict_layers
        per_head = head_activations(config, precision=layout.precision) * tokens + head_gradient_bytes(config)
        activations += layout.in_flight(last) * heads * per_head
        working += _HEAD_CHUNK_BYTES

    fp32 = layout.precision == "fp32"
    matrix, other = weight_bytes(layout.precision)
    parts = {
        "weights": states(matrix * matrices + other * others, matrix * experts, 3),
        "gradients": per_parameter(4, 2),
        "master weights": 0.0 if fp32 else per_parameter(4, 1),
        "moments": per_parameter(8 if fp32 or layout.moments == "fp32" else 4, 1),
        "activations": activations,
        "working": working,
    }
    return RankMemory(rank, numbers, parts, sum(parts.values()))


def _gathered_bytes(layout: Layout, block: _Block) -> float:
    """ZeRO 3's whole blocks: weights of this one and of the next, gathered ahead, and this one's gradient.

    What only one rank holds (experts under EP as wide as data parallelism) was never divided.
    """
    matrix, other = weight_bytes(layout.precision)
    dense_divided, experts_divided = (copies > 1 for copies in layout.copies)
    matrices = dense_divided * block.dense_fp8 + experts_divided * block.experts
    others = dense_divided * block.dense_other
    return 2 * (matrix * matrices + other * others) + 4 * (matrices + others)


def weight_bytes(precision: Precision) -> tuple[float, float]:
    """Bytes per parameter of the weights that compute: (matrices that FP8 may hold, all others)."""
    return {"fp32": (4.0, 4.0), "bf16": (2.0, 2.0), "fp8": (1 + 4 / FP8_BLOCK**2, 2.0)}[precision]


def render(plan: MemoryPlan) -> RenderableType:
    """The plan as tables, one row per pipeline rank."""
    layout = plan.layout
    rows = [
        (
            f"{rank.rank}{' *' if rank.rank == plan.fullest_rank else ''}",
            _spans(rank.blocks),
            *(gib(size) for size in rank.parts.values()),
            gib(rank.total),
        )
        for rank in plan.ranks
    ]
    kinds = sorted({kind for sizes in plan.saved_per_token.values() for kind in sizes})
    return Group(
        table(
            f"Memory per GPU: {describe(layout)}",
            ("rank", "blocks", *plan.ranks[0].parts, "total"),
            rows,
            "* the fullest rank; not counted: CUDA context, communication buffers, fragmentation",
        ),
        table(
            "Saved for the backward pass, per token and block",
            ("kind", *plan.saved_per_token),
            [(kind, *(short(sizes.get(kind, 0), "B") for sizes in plan.saved_per_token.values())) for kind in kinds],
        ),
    )


def describe(layout: Layout) -> str:
    """A layout in one line: '2048 GPUs, PP16 (dualpipe), EP64, ZeRO-1, fp8, recompute selective, 1 x 4096'."""
    pipeline = f"PP{layout.pipeline} ({layout.schedule}), " if layout.pipeline > 1 else ""
    return (
        f"{layout.gpus} GPU{'s' if layout.gpus > 1 else ''}, {pipeline}EP{layout.expert}, ZeRO-{layout.zero}, "
        f"{layout.precision}, recompute {layout.recompute}, {layout.micro_batch} x {layout.sequence_length}"
    )


def _spans(blocks: tuple[int, ...]) -> str:
    """(0, 1, 2, 7, 8) -> '0-2 7-8'."""
    out: list[list[int]] = []
    for block in blocks:
        if out and block == out[-1][-1] + 1:
            out[-1].append(block)
        else:
            out.append([block])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in out)
