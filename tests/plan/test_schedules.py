"""Schedules as data: the published DualPipe order, and that every method runs every operation where it belongs."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.plan.schedules import METHODS, Op, OverlappedPair, make_schedule

GOLDEN = Path(__file__).parent.parent / "goldens" / "dualpipe_4_8.json"
CASES = [
    ("1F1B", 1, 1),
    ("1F1B", 4, 2),
    ("1F1B", 5, 9),
    ("Interleaved1F1B", 3, 3),
    ("Interleaved1F1B", 4, 12),
    ("ZB1P", 4, 3),
    ("ZB1P", 6, 13),
    ("ZBV", 1, 1),
    ("ZBV", 3, 5),
    ("ZBV", 4, 10),
    ("DualPipeV", 1, 2),
    ("DualPipeV", 3, 7),
    ("DualPipeV", 4, 8),
    ("DualPipe", 2, 4),
    ("DualPipe", 6, 12),
    ("DualPipe", 8, 22),
]


def test_dualpipe_is_the_published_schedule() -> None:
    golden = json.loads(GOLDEN.read_text())
    schedule = make_schedule(golden["schedule"], golden["num_ranks"], golden["num_chunks"])
    assert schedule.notation() == [rank["ops"] for rank in golden["ranks"]]


@pytest.mark.parametrize(("name", "num_ranks", "num_chunks"), CASES)
def test_every_operation_runs_once_on_the_rank_that_holds_its_stage(name: str, num_ranks: int, num_chunks: int) -> None:
    schedule = make_schedule(name, num_ranks, num_chunks)
    halves: Counter[tuple[str, int, int]] = Counter()
    for rank, steps in enumerate(schedule.ranks):
        for op in (op for step in steps for op in step.parts):
            assert op.stage in schedule.stages[rank]
            assert rank == schedule.rank_of(op.stage, op.micro_batch)
            for kind in {"F": "F", "B": "IW", "I": "I", "W": "W"}[op.kind]:
                halves[kind, op.stage, op.micro_batch] += 1
    expected = {
        (kind, stage, micro_batch)
        for kind in "FIW"
        for stage in range(schedule.num_stages)
        for micro_batch in range(num_chunks)
    }
    assert set(halves) == expected
    assert set(halves.values()) == {1}


@pytest.mark.parametrize(("name", "num_ranks", "num_chunks"), CASES)
def test_a_rank_runs_forward_then_input_gradient_then_weight_gradient(
    name: str, num_ranks: int, num_chunks: int
) -> None:
    for steps in make_schedule(name, num_ranks, num_chunks).ranks:
        order = {op: position for position, step in enumerate(steps) for op in step.parts}
        for op, position in order.items():
            if op.kind in "BI":
                assert order[Op("F", op.stage, op.micro_batch)] < position
            elif op.kind == "W":
                assert order[Op("I", op.stage, op.micro_batch)] < position


def test_overlapped_pairs_belong_to_different_micro_batches_and_stages() -> None:
    for name in ("DualPipe", "DualPipeV"):
        pairs = [
            step for steps in make_schedule(name, 4, 10).ranks for step in steps if isinstance(step, OverlappedPair)
        ]
        assert pairs
        for pair in pairs:
            assert (pair.forward.kind, pair.backward.kind) == ("F", "B")
            assert pair.forward.micro_batch != pair.backward.micro_batch
            assert pair.forward.stage != pair.backward.stage


def test_where_the_stages_live() -> None:
    """DualPipe holds two copies of the model, a V one; first and last stage, with embedding and head, share a rank."""
    dual, folded = make_schedule("DualPipe", 4, 8), make_schedule("DualPipeV", 4, 8)
    assert dual.stages == ((0, 3), (1, 2), (2, 1), (3, 0))
    assert folded.stages == ((0, 7), (1, 6), (2, 5), (3, 4))
    assert make_schedule("Interleaved1F1B", 2, 4, stages_per_rank=3).stages == ((0, 2, 4), (1, 3, 5))
    assert (dual.parameter_copies, folded.parameter_copies) == (2, 1)
    assert dual.rank_of(0, 0) == 0 and dual.rank_of(0, 4) == 3


def test_labels_count_micro_batches_within_a_phase() -> None:
    schedule = make_schedule("DualPipe", 2, 4)
    assert schedule.label(1, Op("F", 0, 2)) == "F1.0"  # the second half enters at the last rank, phase 1
    assert schedule.label(0, Op("W", 0, 1)) == "W0.1"
    assert schedule.label(0, OverlappedPair(Op("F", 0, 1), Op("B", 1, 2))) == "[F0.1&B1.0]"


def test_names_in_any_case_and_unknown_names() -> None:
    assert make_schedule("dualpipev", 2, 4) == make_schedule("DualPipeV", 2, 4)
    with pytest.raises(UserError, match="no pipeline schedule 'GPipe'; choose one of 1F1B"):
        make_schedule("GPipe", 2, 4)


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_chunks", "message"),
    [
        ("DualPipe", 3, 8, "even number of ranks"),
        ("DualPipe", 4, 9, "take 10"),
        ("DualPipe", 4, 6, "at least 8 chunks"),
        ("DualPipeV", 4, 7, "at least 8 chunks"),
        ("ZBV", 4, 6, "at least 7 chunks"),
        ("Interleaved1F1B", 4, 6, "take 8"),
        ("1F1B", 0, 4, "num_ranks is 0"),
        ("1F1B", 2, 0, "num_chunks is 0"),
    ],
)
def test_numbers_a_method_cannot_run_are_refused_with_what_would_work(
    name: str, num_ranks: int, num_chunks: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_schedule(name, num_ranks, num_chunks)


def test_every_method_is_covered_here() -> None:
    assert {name for name, _, _ in CASES} == set(METHODS)
