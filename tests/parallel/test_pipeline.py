"""A step over a pipeline is the step of one process: every loss, every gradient, every count, in every schedule.

In FP64, where a difference of 1e-12 is a mistake and not rounding; and once in FP32.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.parallel.layout import balanced_layout
from dsv3.parallel.mesh import Axis, Mesh
from dsv3.parallel.pipeline import Pipeline
from tests.parallel.pipeline_cases import (
    MODELS,
    evaluation_difference,
    step_differences,
    torch_differences,
    training_differences,
)
from tests.parallel.world import World

# torch's executor, not ours: in 2.10 a rank with two neighbouring stages opens a connection to itself.
from_torch_2_13 = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="torch's V schedules do not run on gloo in torch 2.10; 2.11 and 2.12 were not tried",
)


def check(world: World, *, each: float = 1e-12, **case: object) -> None:
    """`each` gradient may be off by so much, all of them together and the losses by half."""
    for rank, worst in enumerate(world.run(step_differences, **case)):
        assert worst["missing"] == 0 and worst["counts"] == 0, f"rank {rank}: {worst}"
        assert worst["gradient"] <= each, f"rank {rank}: {worst}"
        assert worst["all gradients"] <= each / 2 and worst["loss"] <= each / 2, f"rank {rank}: {worst}"


@pytest.mark.parametrize(
    ("schedule", "stages", "message"),
    [
        ("1F1B", 3, "3 stages, expected a multiple of the 2 pipeline ranks"),
        ("1F1B", 4, "1F1B on 2 ranks has 2 stages, but the layout has 4"),
        ("DualPipeV", 2, "DualPipeV on 2 ranks has 4 stages, but the layout has 2"),
        ("GPipe", 2, "no pipeline schedule 'GPipe'"),
    ],
)
def test_a_layout_that_the_schedule_cannot_run_is_refused(schedule: str, stages: int, message: str) -> None:
    """Before anything is waited for: this mesh has nobody else in it."""
    config = MODELS["D=1"]
    with pytest.raises(UserError, match=message):
        Pipeline(Transformer(config), balanced_layout(config, stages), Mesh(pp=Axis((0, 1), 0)), schedule=schedule)


TWO = {
    "1F1B": ("Ettt|tttmL", 3),
    "Interleaved1F1B": (4, 4),
    "ZB1P": ("Etttt|ttmL", 4),
    "ZBV": (4, 3),
    "DualPipeV": (4, 5),
    "DualPipe": ("Ettt|tttmL", 6),
}


@pytest.mark.parametrize("schedule", TWO)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("mtp_weight", [0.3, 0.0], ids=["MTP", "no MTP"])
def test_two_ranks(world2: World, seed: int, schedule: str, recompute: str, mtp_weight: float) -> None:
    layout, chunks = TWO[schedule]
    check(
        world2,
        schedule=schedule,
        layout=layout,
        seed=seed,
        sequences=2 * chunks - 1,
        recompute=recompute,
        mtp_weight=mtp_weight,
        dtype="float64",
    )


@pytest.mark.parametrize("schedule", TWO)
def test_two_ranks_in_single_precision(world2: World, seed: int, schedule: str) -> None:
    """The same micro-batches, added up in another order."""
    layout, chunks = TWO[schedule]
    check(world2, each=1e-6, schedule=schedule, layout=layout, seed=seed, sequences=chunks, micro_batch_size=1)


@pytest.mark.parametrize("mtp_weight", [0.3, 0.0], ids=["MTP", "no MTP"])
def test_bf16_travels_and_routers_stay_fp32(world2: World, seed: int, mtp_weight: float) -> None:
    case = {"layout": "Ettt|tttmL", "seed": seed, "sequences": 4, "micro_batch_size": 1, "dtype": "bfloat16"}
    check(world2, each=0.05, schedule="DualPipe", mtp_weight=mtp_weight, **case)


@pytest.mark.parametrize("schedule", ["ZBV", "DualPipe"])
def test_attention_inside_documents(world2: World, seed: int, schedule: str) -> None:
    layout, chunks = TWO[schedule]
    check(world2, schedule=schedule, layout=layout, seed=seed, sequences=2 * chunks, isolate=True, dtype="float64")


EXPERTS = {"1F1B": 4, "ZB1P": 4, "ZBV": 4, "DualPipeV": 6, "DualPipe": 6}


@pytest.mark.parametrize("schedule", EXPERTS)
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_two_ranks_of_two_that_share_experts(world4: World, seed: int, schedule: str, overlap: bool) -> None:
    """Two pipelines with their own sequences; one has a micro-batch less and pads."""
    check(
        world4,
        schedule=schedule,
        layout=4 if "V" in schedule else 2,
        seed=seed,
        sequences=4 * EXPERTS[schedule] - 3,
        ep=2,
        recompute="full" if overlap else "selective",
        overlap=overlap,
        dtype="float64",
    )


def test_experts_that_receive_nothing(world4: World, seed: int) -> None:
    case = {"schedule": "DualPipe", "layout": 2, "seed": seed, "sequences": 16, "ep": 2, "dtype": "float64"}
    for overlap in (False, True):
        check(world4, empty_rank=True, overlap=overlap, **case)


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_experts_over_two_nodes(world4: World, seed: int, recompute: str, overlap: bool) -> None:
    """Both halves of the model on every rank, so that forward and backward are paired; tokens take two hops."""
    check(
        world4,
        schedule="DualPipeV",
        layout="Ettt|tttmL",
        seed=seed,
        sequences=4 * 4 - 3,
        micro_batch_size=1,
        ep=4,
        node_size=2,
        recompute=recompute,
        overlap=overlap,
        dtype="float64",
    )


# Rank 0 has no MoE layer in the first, third and fifth; MTP modules sit on stages of their own, or before the loss.
FOUR = {
    "1F1B": ("Ett|tttt|m|mL", 5),
    "Interleaved1F1B": ("E|t|tt|t|t|t|m|mL", 4),
    "ZB1P": ("Ett|tt|tt|mmL", 6),
    "ZBV": ("E|t|tt|t|t|tm|m|L", 8),
    "DualPipeV": ("Et|tt|t|t|t|m|m|L", 9),
    "DualPipe": ("Ett|tt|ttm|mL", 10),
}


@pytest.mark.parametrize("schedule", FOUR)
@pytest.mark.parametrize("overlap", [False, True])
def test_four_ranks_and_two_mtp_modules(world4: World, seed: int, schedule: str, overlap: bool) -> None:
    layout, chunks = FOUR[schedule]
    check(
        world4,
        schedule=schedule,
        layout=layout,
        seed=seed,
        sequences=2 * chunks - 1,
        model="D=2, two dense",
        recompute="full" if overlap else "none",
        overlap=overlap,
        dtype="float64",
    )


@pytest.mark.parametrize("schedule", ["1F1B", "DualPipe"])
def test_a_model_without_mtp_bias_or_balance_loss(world4: World, seed: int, schedule: str) -> None:
    check(
        world4,
        schedule=schedule,
        layout="Et|tt|tt|ttL",
        seed=seed,
        sequences=8,
        micro_batch_size=1,
        model="no MTP, greedy",
        mtp_weight=0.0,
        dtype="float64",
    )


@pytest.mark.parametrize(
    ("schedule", "layout", "chunks"),
    [
        pytest.param("1F1B", "Ettt|tttmL", 3, marks=pytest.mark.slow),
        pytest.param("ZBV", "Ett|tt|t|tmL", 3, marks=pytest.mark.slow),
        ("DualPipe", "Ettt|tttmL", 4),
    ],
)
def test_twenty_optimizer_steps(world2: World, seed: int, schedule: str, layout: str, chunks: int) -> None:
    case = {"schedule": schedule, "layout": layout, "seed": seed, "chunks": chunks, "steps": 20}
    for worst in world2.run(training_differences, **case):
        assert worst["load"] == 0 and worst["bias"] == 0, worst
        assert worst["loss"] <= 1e-10 and worst["weight"] <= 1e-10, worst


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "layout"), [("1F1B", "Ettt|tttmL"), ("DualPipe", "Ettt|tttmL")])
def test_twenty_optimizer_steps_of_two_pipelines(world4: World, seed: int, schedule: str, layout: str) -> None:
    """Pipeline x data x expert parallelism, optimizer states shared, transfers overlapped."""
    case = {"schedule": schedule, "layout": layout, "seed": seed, "chunks": 4, "steps": 20, "ep": 2}
    for worst in world4.run(training_differences, **case):
        assert worst["load"] == 0 and worst["bias"] == 0, worst
        assert worst["loss"] <= 1e-10 and worst["weight"] <= 1e-10, worst


# Two pipelines beside each other share their parameters; with ep 2, all but the experts, which are divided already. And
# four pipelines of one rank each, in which all axes of the data are there at once.
SHARED = {
    "pp 2, shard 2": {"pp": 2, "dp_shard": 2},
    "pp 2, shard 2, ep 2": {"pp": 2, "dp_shard": 2, "ep": 2},
    "shard 4, ep 2": {"pp": 1, "dp_shard": 4, "ep": 2},
    "replicate 2, shard 2": {"pp": 1, "dp_replicate": 2, "dp_shard": 2},
    "replicate 2, shard 2, ep 2": {"pp": 1, "dp_replicate": 2, "dp_shard": 2, "ep": 2},
}


def check_shared(world: World, axes: str, schedule: str, **case: object) -> None:
    ranks, (layout, chunks) = SHARED[axes]["pp"], TWO[schedule]
    if ranks == 1:
        layout = 1 if schedule == "1F1B" else 2
    check(
        world,
        schedule=schedule,
        layout=layout,
        sequences=2 * chunks * 4 // ranks - 1,
        axes=SHARED[axes],
        overlap=schedule.startswith("Dual"),
        dtype="float64",
        **case,
    )


@pytest.mark.parametrize(
    ("axes", "schedule", "recompute"),
    [
        ("pp 2, shard 2", "1F1B", "none"),
        ("pp 2, shard 2", "ZBV", "selective"),
        ("pp 2, shard 2, ep 2", "DualPipe", "selective"),
        ("shard 4, ep 2", "DualPipeV", "full"),
        ("replicate 2, shard 2", "1F1B", "full"),
    ],
)
def test_pipelines_that_share_parameters(world4: World, seed: int, axes: str, schedule: str, recompute: str) -> None:
    """Rows on each rank, whole only while a piece uses them; on a pipeline of one rank as on others."""
    check_shared(world4, axes, schedule, seed=seed, recompute=recompute)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "schedule"),
    [(axes, schedule) for axes in SHARED for schedule in (TWO if "pp 2" in axes else ("1F1B", "ZBV", "DualPipeV"))],
)
def test_everything_with_shared_parameters(world4: World, seed: int, axes: str, schedule: str) -> None:
    for recompute, mtp_weight in itertools.product(("none", "selective", "full"), (0.3, 0.0)):
        check_shared(world4, axes, schedule, seed=seed, recompute=recompute, mtp_weight=mtp_weight)


@pytest.mark.parametrize(
    ("axes", "schedule", "layout", "optimizer"),
    [
        ("pp 2, shard 2, ep 2", "DualPipe", "Ettt|tttmL", "adamw"),
        pytest.param("pp 2, shard 2", "1F1B", "Ettt|tttmL", "muon", marks=pytest.mark.slow),
        pytest.param("replicate 2, shard 2", "1F1B", "EttttttmL", "muon", marks=pytest.mark.slow),
    ],
)
def test_optimizer_steps_with_shared_parameters(
    world4: World, seed: int, axes: str, schedule: str, layout: str, optimizer: str
) -> None:
    case = {"schedule": schedule, "layout": layout, "seed": seed, "chunks": 4, "axes": SHARED[axes]}
    for worst in world4.run(training_differences, steps=8, optimizer=optimizer, **case):
        assert worst["load"] == 0 and worst["bias"] == 0, worst
        assert worst["loss"] <= 1e-10 and worst["weight"] <= 1e-10, worst


@pytest.mark.parametrize(
    ("schedule", "stages", "chunks"),
    [
        ("1F1B", 2, 3),
        ("Interleaved1F1B", 4, 4),
        pytest.param("ZBVZeroBubble", 4, 4, marks=from_torch_2_13),
        pytest.param("DualPipeV", 4, 4, marks=from_torch_2_13),
    ],
)
def test_torchs_schedules_run_the_same_stages(
    world2: World, seed: int, schedule: str, stages: int, chunks: int
) -> None:
    """A cross-check with another executor: without MTP, torch's pipelining gets the same gradients from our cut."""
    for worst in world2.run(torch_differences, schedule=schedule, stages=stages, seed=seed, chunks=chunks):
        assert worst <= 1e-12


@pytest.mark.parametrize(("schedule", "stages"), [("1F1B", 4), ("ZBV", 8), ("DualPipe", 4)])
@pytest.mark.parametrize("chunks", [1, 5])
def test_forward_passes_alone(world4: World, seed: int, schedule: str, stages: int, chunks: int) -> None:
    case = {"schedule": schedule, "stages": stages, "seed": seed, "chunks": chunks}
    assert max(world4.run(evaluation_difference, **case)) <= 1e-13
