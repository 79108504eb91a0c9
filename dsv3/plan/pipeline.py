"""When would each step of a pipeline schedule run, and how long would the ranks wait?

An event simulator for the schedules of `dsv3.plan.schedules`: a step starts as soon as its rank is free and what it
needs has arrived. Communication runs beside computation: an output reaches another rank `P2P` after the step that made
it has ended, the same rank at once; links are never the bottleneck. Times are in whatever unit the durations are.

How the figures are measured:
- makespan: from time 0 until the last rank has ended its last step;
- bubble of a rank: the makespan less the durations of all its steps, so waiting before the first and after the last
  step counts;
- activations in flight on a rank: (stage, micro-batch) pairs whose forward has started and whose backward has not
  ended. A split backward ends with W, which still needs the inputs of the matrices.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from dsv3.errors import UserError
from dsv3.files import atomic_writer, make_folder
from dsv3.plan.display import table
from dsv3.plan.schedules import METHODS, Op, OverlappedPair, Schedule, Step, make_schedule

# What a finished operation provides: "F" the stage's output, "I" the gradient of its input, "W" its weight gradients.
_Result = tuple[str, int, int]


@dataclass(frozen=True)
class Durations:
    """How long each kind of step takes on one stage, and a transfer between two ranks; any unit, the same for all.

    The defaults are the unit times of the published comparison: a backward twice a forward, half of it the weights'.
    """

    forward: float = 1.0
    backward: float = 2.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    overlapped: float = 3.0
    transfer: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value) or value < 0 or (value == 0 and name != "transfer"):
                expected = "of at least 0" if name == "transfer" else "above 0"
                raise UserError(f"duration '{name}' is {value}, expected a finite number {expected}")

    @classmethod
    def from_mapping(cls, times: Mapping[str, float]) -> Durations:
        """Durations by the letters of the schedules: {"F": .., "B": .., "I": .., "W": .., "F&B": .., "P2P": ..}.

        F and B are needed. Without the others: W = B/2, I = B - W, F&B = F + B (overlap gains nothing), P2P = 0.
        """
        unknown = set(times) - {"F", "B", "I", "W", "F&B", "P2P"}
        if unknown or not {"F", "B"} <= set(times):
            raise UserError(f"durations have the keys {sorted(times)}; expected F and B, and any of I, W, F&B, P2P")
        for name, value in times.items():
            if not isinstance(value, (int, float)):
                raise UserError(f"duration '{name}' is {value!r}, expected a number")
        weight_gradient = times.get("W", times["B"] / 2)
        return cls(
            forward=times["F"],
            backward=times["B"],
            input_gradient=times.get("I", times["B"] - weight_gradient),
            weight_gradient=weight_gradient,
            overlapped=times.get("F&B", times["F"] + times["B"]),
            transfer=times.get("P2P", 0.0),
        )

    def to_mapping(self) -> dict[str, float]:
        """The inverse of `from_mapping`."""
        return dict(zip(("F", "B", "I", "W", "F&B", "P2P"), asdict(self).values(), strict=True))

    def of_smaller_stages(self, parts: float) -> Durations:
        """The same model cut into `parts` times as many stages. A transfer carries what it carried."""
        times = {name: value / parts for name, value in asdict(self).items()}
        return Durations(**{**times, "transfer": self.transfer})

    def of(self, step: Step) -> float:
        """Duration of one step."""
        if isinstance(step, OverlappedPair):
            return self.overlapped
        kinds = {"F": self.forward, "B": self.backward, "I": self.input_gradient, "W": self.weight_gradient}
        return kinds[step.kind]


@dataclass(frozen=True)
class Span:
    """One step with its start and end."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule with times; lists by rank. The module docstring says how each is measured."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    bubble: tuple[float, ...]
    peak_in_flight: tuple[int, ...]

    @property
    def makespan(self) -> float:
        """End of the last step of all."""
        return max(span.end for spans in self.spans for span in spans)


def simulate(schedule: Schedule, durations: Durations | Mapping[str, float] | None = None) -> Timeline:
    """Runs `schedule` with `durations` of its own steps (one stage each, however many stages there are).

    Raises `UserError` if the schedule is not a whole training step or if its ranks would wait for each other for ever,
    naming the steps that wait and for what.
    """
    if not isinstance(durations, Durations):
        durations = Durations() if durations is None else Durations.from_mapping(durations)
    _check_whole(schedule)
    num_stages = schedule.num_stages
    made: dict[_Result, tuple[float, int]] = {}  # when, and on which rank
    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    pending = True
    while pending:
        pending = False
        for rank, steps in enumerate(schedule.ranks):
            while len(spans[rank]) < len(steps):
                step = steps[len(spans[rank])]
                needs = _needs(num_stages, step)
                if any(need not in made for need in needs):
                    break
                arrivals = [made[need][0] + durations.transfer * (made[need][1] != rank) for need in needs]
                start = max([*arrivals, spans[rank][-1].end if spans[rank] else 0.0])
                span = Span(step, start, start + durations.of(step))
                spans[rank].append(span)
                made.update((_makes(op), (span.end, rank)) for op in step.parts)
                pending = True
    _check_finished(schedule, spans, made)
    makespan = max(rank_spans[-1].end for rank_spans in spans)
    return Timeline(
        schedule,
        spans=tuple(tuple(rank_spans) for rank_spans in spans),
        bubble=tuple(makespan - sum(durations.of(span.step) for span in rank_spans) for rank_spans in spans),
        peak_in_flight=tuple(_peak_in_flight(steps) for steps in schedule.ranks),
    )


def _makes(op: Op) -> _Result:
    return ("I" if op.kind == "B" else op.kind, op.stage, op.micro_batch)


def _needs(num_stages: int, step: Step) -> list[_Result]:
    needs: list[_Result] = []
    for op in step.parts:
        if op.kind == "F" and op.stage > 0:
            needs.append(("F", op.stage - 1, op.micro_batch))
        elif op.kind == "W":
            needs.append(("I", op.stage, op.micro_batch))
        elif op.kind in "BI":
            needs.append(("F", op.stage, op.micro_batch))
            if op.stage < num_stages - 1:
                needs.append(("I", op.stage + 1, op.micro_batch))
    return needs


def _check_whole(schedule: Schedule) -> None:
    """Every stage runs every micro-batch once forward and once backward, on the rank that holds it."""
    found: Counter[tuple[str, int, int, int]] = Counter()
    for rank, steps in enumerate(schedule.ranks):
        for op in (op for step in steps for op in step.parts):
            for kind in "IW" if op.kind == "B" else op.kind:
                found[kind, op.stage, op.micro_batch, rank] += 1
    for stage in range(schedule.num_stages):
        for micro_batch in range(schedule.num_chunks):
            rank = schedule.rank_of(stage, micro_batch)
            for kind in "FIW":
                times = found.pop((kind, stage, micro_batch, rank), 0)
                if times != 1:
                    raise UserError(
                        f"schedule {schedule.name} runs {kind} of stage {stage}, micro-batch {micro_batch}, "
                        f"{times} times on rank {rank}, expected once (a B counts as I and W)"
                    )
    if found:
        kind, stage, micro_batch, rank = next(iter(found))
        raise UserError(
            f"schedule {schedule.name} runs {kind} of stage {stage}, micro-batch {micro_batch}, on rank {rank}, "
            "where it does not belong"
        )


def _check_finished(schedule: Schedule, spans: list[list[Span]], made: Mapping[_Result, object]) -> None:
    waiting = []
    for rank, steps in enumerate(schedule.ranks):
        if len(spans[rank]) < len(steps):
            step = steps[len(spans[rank])]
            missing = ", ".join(
                f"{kind} of stage {stage}, micro-batch {micro_batch}"
                for kind, stage, micro_batch in _needs(schedule.num_stages, step)
                if (kind, stage, micro_batch) not in made
            )
            waiting.append(f"rank {rank} at {schedule.label(rank, step)} for {missing}")
    if waiting:
        raise UserError(
            f"schedule {schedule.name} cannot go on: {'; '.join(waiting)}; reorder the steps of these ranks"
        )


def _peak_in_flight(steps: Iterable[Step]) -> int:
    in_flight = peak = 0
    for step in steps:
        in_flight += any(op.kind == "F" for op in step.parts)
        peak = max(peak, in_flight)
        in_flight -= any(op.kind in "BW" for op in step.parts)
    return peak


def chrome_trace(timeline: Timeline, *, microseconds_per_unit: float = 1000.0) -> dict[str, Any]:
    """The timeline as Chrome trace events (chrome://tracing, Perfetto): one thread per rank, one slice per step.

    Trace times are microseconds; a unit of the durations is drawn as `microseconds_per_unit`.
    """
    schedule = timeline.schedule
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(timeline.spans):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}})
        for span in spans:
            events.append(
                {
                    "name": schedule.label(rank, span.step),
                    "cat": "+".join(op.kind for op in span.step.parts),
                    "ph": "X",
                    "pid": 0,
                    "tid": rank,
                    "ts": span.start * microseconds_per_unit,
                    "dur": (span.end - span.start) * microseconds_per_unit,
                    "args": {"operations": [asdict(op) for op in span.step.parts]},
                }
            )
    return {"displayTimeUnit": "ms", "otherData": {"schedule": schedule.name}, "traceEvents": events}


def save_chrome_trace(timeline: Timeline, path: str | Path) -> None:
    """Writes `chrome_trace(timeline)` as JSON, atomically."""
    make_folder(Path(path).parent)
    with atomic_writer(Path(path)) as file:
        file.write(json.dumps(chrome_trace(timeline)).encode())


def plan_pipeline(
    num_ranks: int,
    num_chunks: int,
    *,
    durations: Durations | Mapping[str, float] | None = None,
    methods: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Compares schedules for one model on `num_ranks` ranks with `num_chunks` micro-batches a step; JSON-able.

    `durations` are those of 1/num_ranks of the model. A method with smaller stages (Interleaved1F1B, ZBV, DualPipeV:
    half) gets its share of them, so every rank computes the same amount under every method. Activations are counted in
    micro-batches through 1/num_ranks of the model, parameters in copies of the model.

    Methods named in `methods` must be able to run; without it all are tried, and those that cannot run these numbers
    are listed under "refused" with the reason.
    """
    if not isinstance(durations, Durations):
        durations = Durations() if durations is None else Durations.from_mapping(durations)
    rows, refused = [], []
    for name in METHODS if methods is None else methods:
        try:
            schedule = make_schedule(name, num_ranks, num_chunks)
        except UserError as error:
            if methods is not None or num_ranks < 1 or num_chunks < 1:
                raise
            refused.append({"method": name, "reason": str(error)})
            continue
        rows.append(_compare(schedule, durations))
    return {
        "num_ranks": num_ranks,
        "num_chunks": num_chunks,
        "durations": durations.to_mapping(),
        "methods": rows,
        "refused": refused,
        "fastest": min(rows, key=lambda row: row["makespan"])["method"],
    }


def _compare(schedule: Schedule, durations: Durations) -> dict[str, Any]:
    smaller = schedule.num_stages / schedule.num_ranks
    timeline = simulate(schedule, durations.of_smaller_stages(smaller))
    return {
        "method": schedule.name,
        "makespan": timeline.makespan,
        "bubble": max(timeline.bubble),
        "bubble_by_rank": list(timeline.bubble),
        "bubble_fraction": sum(timeline.bubble) / (schedule.num_ranks * timeline.makespan),
        "bubble_formula": _bubble_formula(schedule, durations),
        "activations": max(timeline.peak_in_flight) / smaller,
        "activations_by_rank": [peak / smaller for peak in timeline.peak_in_flight],
        "parameter_copies": schedule.parameter_copies,
    }


def _bubble_formula(schedule: Schedule, durations: Durations) -> float | None:
    """The published bubble: table 2 of the DeepSeek-V3 report, and Narayanan et al. 2021; None where there is none.

    Without transfers and with enough micro-batches the first two are exact for any durations, ZB1P's for W no longer
    than I, DualPipe's and DualPipeV's for F = I = W. (For DualPipeV the report's PP is its number of stages, halves.)
    """
    times, last = durations, schedule.num_ranks - 1
    match schedule.name:
        case "1F1B":
            return last * (times.forward + times.backward)
        case "Interleaved1F1B":
            return last * (times.forward + times.backward) * schedule.num_ranks / schedule.num_stages
        case "ZB1P":
            return last * (times.forward + times.backward - 2 * times.weight_gradient)
        case "DualPipe":
            hops = schedule.num_ranks / 2 - 1
            return hops * (times.overlapped + times.backward - 3 * times.weight_gradient)
        case "DualPipeV":
            return last * (times.overlapped + times.backward - 3 * times.weight_gradient) / 2
    return None


def render(result: Mapping[str, Any]) -> RenderableType:
    """`plan_pipeline`'s result as a table."""
    rows = [
        (
            row["method"],
            f"{row['makespan']:g}",
            f"{row['bubble']:g}",
            "-" if row["bubble_formula"] is None else f"{row['bubble_formula']:g}",
            f"{row['bubble_fraction']:.1%}",
            f"{row['activations']:g}",
            f"{row['parameter_copies']:g}x",
        )
        for row in result["methods"]
    ]
    return table(
        f"{result['num_ranks']} ranks, {result['num_chunks']} micro-batches a step",
        ("method", "makespan", "bubble", "published", "idle", "in flight", "weights"),
        rows,
        "\n".join(row["reason"] for row in result["refused"]) or None,
    )
