"""The pipeline simulator against published numbers, against a slow simulator of another kind, and against nonsense."""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from dsv3.errors import UserError
from dsv3.plan.pipeline import Durations, chrome_trace, plan_pipeline, render, save_chrome_trace, simulate
from dsv3.plan.pipeline_figure import pipeline_figure
from dsv3.plan.schedules import METHODS, Op, OverlappedPair, Schedule, make_schedule

GOLDEN = Path(__file__).parent.parent / "goldens" / "dualpipe_4_8.json"


@pytest.mark.parametrize(("num_ranks", "num_chunks", "makespan"), [(4, 8, 26), (8, 20, 66), (8, 40, 126)])
def test_dualpipe_takes_the_published_time_and_memory(num_ranks: int, num_chunks: int, makespan: int) -> None:
    timeline = simulate(make_schedule("DualPipe", num_ranks, num_chunks))
    assert timeline.makespan == makespan
    assert timeline.peak_in_flight == (num_ranks + 1,) * num_ranks


def test_dualpipe_peak_is_the_golden_one() -> None:
    golden = json.loads(GOLDEN.read_text())
    timeline = simulate(make_schedule("DualPipe", golden["num_ranks"], golden["num_chunks"]))
    assert list(timeline.peak_in_flight) == [rank["peak_in_flight"] for rank in golden["ranks"]]


@pytest.mark.parametrize(("name", "bubble", "activations"), [("1F1B", 21, 8), ("ZB1P", 7, 8), ("DualPipe", 6, 9)])
def test_the_table_of_the_report_for_eight_ranks(name: str, bubble: int, activations: int) -> None:
    timeline = simulate(make_schedule(name, 8, 24))
    assert timeline.bubble == (bubble,) * 8
    assert max(timeline.peak_in_flight) == activations


@pytest.mark.parametrize("num_ranks", [2, 4, 6, 10])
@pytest.mark.parametrize("extra", [0, 4])
def test_measured_bubbles_are_the_published_formulas(num_ranks: int, extra: int) -> None:
    """Each for the durations that its formula is exact for; the bubble is that of the rank that waits most."""

    def rows(durations: dict[str, float]) -> dict[str, tuple[float, float]]:
        plan = plan_pipeline(num_ranks, num_ranks * (2 + extra), durations=durations)
        assert not plan["refused"]
        return {row["method"]: (row["bubble"], row["bubble_formula"]) for row in plan["methods"]}

    uneven, even = rows({"F": 1.3, "B": 2.5, "W": 1.1}), rows({"F": 1.0, "B": 2.0, "F&B": 2.6})
    for measured, published in [
        *(uneven[name] for name in ("1F1B", "Interleaved1F1B", "ZB1P")),
        *(even[name] for name in ("1F1B", "Interleaved1F1B", "ZB1P", "DualPipeV", "DualPipe")),
    ]:
        assert measured == pytest.approx(published)


def test_zbv_idles_only_for_the_skew_of_the_ranks() -> None:
    timeline = simulate(make_schedule("ZBV", 6, 14))
    for rank, spans in enumerate(timeline.spans):
        assert spans[0].start == rank
        assert spans[-1].end - spans[0].start == 14 * 6  # F, I and W of two stages, without a gap
    assert timeline.peak_in_flight == (12,) * 6


def slow_starts(schedule: Schedule, durations: Durations) -> dict[Op | OverlappedPair, float]:
    """Earliest starts as a least fixed point, from scratch: everything starts at 0 until something forbids it."""
    steps = {step: (rank, i) for rank, row in enumerate(schedule.ranks) for i, step in enumerate(row)}
    length = {step: durations.overlapped if isinstance(step, OverlappedPair) else durations.of(step) for step in steps}
    makes = {part: step for step in steps for part in step.parts}
    before: dict[Op | OverlappedPair, list[tuple[Op | OverlappedPair, float]]] = {step: [] for step in steps}
    for step, (rank, i) in steps.items():
        if i:
            before[step].append((schedule.ranks[rank][i - 1], 0.0))
        for part in step.parts:
            stage, batch = part.stage, part.micro_batch
            wanted = {
                "F": [Op("F", stage - 1, batch)],
                "W": [Op("I", stage, batch)],
            }.get(part.kind, [Op("F", stage, batch), Op("B", stage + 1, batch), Op("I", stage + 1, batch)])
            for need in wanted:
                if need in makes:
                    other = makes[need]
                    before[step].append((other, durations.transfer if steps[other][0] != rank else 0.0))
    start = dict.fromkeys(steps, 0.0)
    changed = True
    while changed:
        changed = False
        for step, needs in before.items():
            earliest = max((start[other] + length[other] + wait for other, wait in needs), default=0.0)
            if earliest > start[step] + 1e-9:
                start[step], changed = earliest, True
    return start


@pytest.mark.parametrize(("name", "seed"), list(itertools.product(METHODS, range(3))))
def test_every_step_starts_as_early_as_it_can(name: str, seed: int) -> None:
    rng = random.Random(f"{name}{seed}")
    num_ranks = rng.choice([2, 4])
    schedule = make_schedule(name, num_ranks, num_ranks * rng.choice([2, 3]))
    durations = Durations(*(rng.uniform(0.2, 3) for _ in range(5)), transfer=rng.choice([0.0, 0.7]))
    expected = slow_starts(schedule, durations)
    timeline = simulate(schedule, durations)
    seen = {span.step: span.start for spans in timeline.spans for span in spans}
    assert seen == pytest.approx(expected)
    for spans in timeline.spans:
        assert all(one.end <= other.start + 1e-9 for one, other in itertools.pairwise(spans))


def test_bubble_is_what_is_left_of_the_makespan() -> None:
    times = Durations(forward=2, backward=3, transfer=0.5)
    schedule = make_schedule("1F1B", 3, 5)
    timeline = simulate(schedule, times)
    slow = slow_starts(schedule, times)
    makespan = max(start + times.of(step) for step, start in slow.items())
    assert timeline.makespan == pytest.approx(makespan)
    assert timeline.bubble == pytest.approx([makespan - 5 * (2 + 3)] * 3)


def test_transfers_delay_the_next_rank_but_not_the_next_stage_on_the_same_rank() -> None:
    line, fold = make_schedule("1F1B", 2, 1), make_schedule("DualPipeV", 1, 2)
    assert simulate(line, {"F": 1, "B": 2, "P2P": 10}).makespan == 2 * (1 + 2) + 2 * 10
    times = {"F": 1, "B": 2}
    assert simulate(fold, {**times, "P2P": 10}).makespan == simulate(fold, times).makespan


def test_durations_by_letter() -> None:
    durations = Durations.from_mapping({"F": 2, "B": 5})
    assert durations.to_mapping() == {"F": 2, "B": 5, "I": 2.5, "W": 2.5, "F&B": 7, "P2P": 0}
    assert Durations.from_mapping(durations.to_mapping()) == durations
    assert durations.of_smaller_stages(2).to_mapping() == {"F": 1, "B": 2.5, "I": 1.25, "W": 1.25, "F&B": 3.5, "P2P": 0}


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"F": 1}, "expected F and B"),
        ({"F": 1, "B": 2, "X": 1}, "expected F and B, and any of"),
        ({"F": -1, "B": 2}, "'forward' is -1"),
        ({"F": 1, "B": float("nan")}, "'backward' is nan"),
        ({"F": 1, "B": 2, "W": 3}, "'input_gradient' is -1"),
        ({"F": 0, "B": 2}, "'forward' is 0"),
        ({"F": "1", "B": 2}, "'F' is '1'"),
    ],
)
def test_bad_durations_are_refused(times: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        simulate(make_schedule("1F1B", 2, 2), times)


def rewritten(schedule: Schedule, rank: int, steps: list[Op | OverlappedPair]) -> Schedule:
    return dataclasses.replace(schedule, ranks=(*schedule.ranks[:rank], tuple(steps), *schedule.ranks[rank + 1 :]))


def test_a_deadlock_names_the_steps_that_wait() -> None:
    schedule = make_schedule("1F1B", 2, 2)
    first = schedule.ranks[0]
    stuck = rewritten(schedule, 0, [first[0], *first[2:], first[1]])  # the backward of 0 before the forward of 1 ..
    stuck = rewritten(
        stuck, 1, [*[op for op in stuck.ranks[1] if op.kind == "F"], *[op for op in stuck.ranks[1] if op.kind == "B"]]
    )
    with pytest.raises(UserError) as caught:
        simulate(stuck)
    assert "rank 0 at B0.0 for I of stage 1, micro-batch 0" in str(caught.value)
    assert "rank 1 at F0.1 for F of stage 0, micro-batch 1" in str(caught.value)


def test_a_schedule_that_is_no_whole_step_is_refused() -> None:
    schedule = make_schedule("ZB1P", 2, 3)
    steps = list(schedule.ranks[1])
    with pytest.raises(UserError, match="W of stage 1, micro-batch 2, 0 times on rank 1"):
        simulate(rewritten(schedule, 1, [step for step in steps if step != Op("W", 1, 2)]))
    with pytest.raises(UserError, match="F of stage 1, micro-batch 0, 2 times on rank 1"):
        simulate(rewritten(schedule, 1, [*steps, Op("F", 1, 0)]))
    with pytest.raises(UserError, match="F of stage 0, micro-batch 0, on rank 1, where it does not belong"):
        simulate(rewritten(schedule, 1, [*steps, Op("F", 0, 0)]))


def test_peak_in_flight_counts_until_the_weight_gradients_are_done() -> None:
    def peak(*kinds: str) -> int:
        ops = [Op(kind, 0, int(number)) for kind, number in kinds]  # type: ignore[arg-type]
        return simulate(Schedule("test", 2, ((0,),), (tuple(ops),))).peak_in_flight[0]

    assert peak("F0", "B0", "F1", "B1") == 1
    assert peak("F0", "I0", "W0", "F1", "B1") == 1
    assert peak("F0", "I0", "F1", "W0", "B1") == 2


def test_chrome_trace_holds_every_step(tmp_path: Path) -> None:
    timeline = simulate(make_schedule("DualPipe", 4, 8), {"F": 1, "B": 2, "F&B": 2.5})
    path = tmp_path / "new folder" / "trace.json"
    save_chrome_trace(timeline, path)
    trace = json.loads(path.read_text())
    assert trace == chrome_trace(timeline)
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == sum(len(steps) for steps in timeline.schedule.ranks)
    assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(timeline.makespan * 1000)
    pair = next(event for event in slices if event["name"] == "[F0.3&B1.1]" and event["tid"] == 0)
    assert pair["dur"] == 2500 and [op["kind"] for op in pair["args"]["operations"]] == ["F", "B"]
    assert list(path.parent.iterdir()) == [path]


def test_plan_compares_methods_on_equal_work() -> None:
    plan = plan_pipeline(8, 24, durations={"F": 1, "B": 2, "W": 1, "F&B": 3})
    json.dumps(plan)
    assert [row["method"] for row in plan["methods"]] == list(METHODS)
    for row in plan["methods"]:
        assert row["makespan"] == pytest.approx(24 * 3 + row["bubble"]), row["method"]
    rows = {row["method"]: row for row in plan["methods"]}
    assert rows["DualPipe"]["activations"] == 9 and rows["DualPipe"]["parameter_copies"] == 2
    assert rows["DualPipeV"]["activations"] == 8.5 and rows["DualPipeV"]["parameter_copies"] == 1
    assert plan["fastest"] == "ZBV"
    console = Console(width=100)
    with console.capture() as shown:
        console.print(render(plan))
    assert all(name in shown.get() for name in METHODS)


def test_plan_lists_what_cannot_run_unless_it_was_asked_for() -> None:
    plan = plan_pipeline(5, 8)
    assert [row["method"] for row in plan["refused"]] == ["Interleaved1F1B", "ZBV", "DualPipeV", "DualPipe"]
    assert "even number of ranks" in plan["refused"][-1]["reason"]
    console = Console(width=100)
    with console.capture() as shown:
        console.print(render(plan))
    assert "even number" in shown.get()
    with pytest.raises(UserError, match="even number of ranks"):
        plan_pipeline(5, 10, methods=["DualPipe"])
    with pytest.raises(UserError, match="num_chunks is 0"):
        plan_pipeline(4, 0)


def test_overlap_shortens_dualpipe_alone() -> None:
    hidden = {row["method"]: row for row in plan_pipeline(4, 16, durations={"F": 1, "B": 2, "F&B": 2.2})["methods"]}
    plain = {row["method"]: row for row in plan_pipeline(4, 16, durations={"F": 1, "B": 2})["methods"]}
    for name in METHODS:
        assert (hidden[name]["makespan"] < plain[name]["makespan"]) == name.startswith("DualPipe"), name


def test_figure_is_a_png_as_wide_as_the_schedule_is_long(tmp_path: Path) -> None:
    sizes = {}
    for chunks in (8, 60):
        path = tmp_path / f"{chunks}.png"
        pipeline_figure(simulate(make_schedule("DualPipe", 4, chunks)), path)
        image = imread(path)
        sizes[chunks] = image.shape
        assert len({tuple(pixel) for pixel in image[::4, ::4, :3].reshape(-1, 3).tolist()}) > 8  # all hues are there
    assert sizes[60][1] > sizes[8][1] and sizes[60][0] == sizes[8][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["60.png", "8.png"]
