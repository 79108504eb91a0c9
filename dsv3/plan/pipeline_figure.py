"""A schedule drawn by rank: time runs right, a box is a step with its micro-batch, what stays pale is bubble."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dsv3.files import atomic_writer, make_folder
from dsv3.plan.pipeline import Span, Timeline
from dsv3.plan.schedules import Op

_NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
# A kind keeps its hue; later phases are lighter.
_COLOURS = {
    "F": ("#3b6fb6", "#9cc0ea", "#d3e3f6"),
    "B": ("#2f8f6b", "#94d3b8", "#d2eee2"),
    "I": ("#d9822b", "#f6bf85", "#fbe3c8"),
    "W": ("#8a6fb8", "#c6b5e2", "#e6def3"),
}
_IDLE = "#f1f1ef"
_ROW = 0.86  # height of a rank's boxes, of 1
_INCHES_PER_RANK = 0.42


def pipeline_figure(timeline: Timeline, path: str | Path) -> None:
    """Writes the timeline as a PNG to `path`, atomically.

    The upper half of a two-coloured box is the forward of an overlapped pair, the lower half its backward. Numbers are
    micro-batches, counted within the phase; where boxes are too narrow for them they are left out.
    """
    schedule = timeline.schedule
    shortest = min(span.end - span.start for spans in timeline.spans for span in spans)
    width = min(max(9.0, 0.26 * timeline.makespan / shortest), 24.0)
    height = _INCHES_PER_RANK * schedule.num_ranks + 1.75
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    inches_per_time = 0.92 * width / timeline.makespan
    boxes = []
    for rank, spans in enumerate(timeline.spans):
        axes.add_patch(Rectangle((0, rank - _ROW / 2), timeline.makespan, _ROW, facecolor=_IDLE, linewidth=0))
        for span in spans:
            boxes += _draw_labels(axes, timeline, rank, span, inches_per_time)
    # One collection: a patch of its own for each of thousands of boxes takes several times as long.
    corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for (x, y, w, h), _ in boxes]
    colours = [colour for _, colour in boxes]
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=0.5))
    _frame(axes, timeline)
    _legend(figure, timeline)
    make_folder(Path(path).parent)
    with atomic_writer(Path(path)) as file:
        figure.savefig(file, format="png")


def _draw_labels(
    axes: Axes, timeline: Timeline, rank: int, span: Span, inches_per_time: float
) -> list[tuple[tuple[float, float, float, float], str]]:
    """Writes a step's micro-batches where they fit; returns its boxes (left, bottom, width, height) with colours."""
    parts = span.step.parts
    length, height = span.end - span.start, _ROW / len(parts)
    size = 7.0 if len(parts) == 1 else 6.0
    boxes = []
    for index, op in enumerate(parts):
        bottom = rank - _ROW / 2 + index * height
        colour = _colour(timeline, rank, op)
        boxes.append(((span.start, bottom, length, height), colour))
        label = timeline.schedule.label(rank, op).partition(".")[2]
        if length * inches_per_time > 0.011 * size * len(label) + 0.03:
            dark = colour in (shades[0] for shades in _COLOURS.values())
            text = axes.text(
                span.start + length / 2,
                bottom + height / 2,
                label,
                ha="center",
                va="center_baseline",
                fontsize=size,
                color="white" if dark else "#222222",
            )
            text.set_in_layout(False)  # inside the axes anyway; measuring thousands takes long
    return boxes


def _colour(timeline: Timeline, rank: int, op: Op) -> str:
    shades = _COLOURS[op.kind]
    phase = timeline.schedule.stages[rank].index(op.stage)
    return shades[min(phase, len(shades) - 1)]


def _frame(axes: Axes, timeline: Timeline) -> None:
    schedule = timeline.schedule
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(schedule.num_ranks - 0.5, -0.5)
    axes.set_yticks(range(schedule.num_ranks), [f"rank {rank}" for rank in range(schedule.num_ranks)])
    axes.set_xlabel("time")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    peaks = sorted(set(timeline.peak_in_flight))
    peak = f"{peaks[0]}" if len(peaks) == 1 else f"{peaks[0]} to {peaks[-1]}"
    axes.set_title(
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_chunks} micro-batches  ·  "
        f"makespan {timeline.makespan:g}  ·  bubble {max(timeline.bubble):g}  ·  {peak} activations in flight",
        loc="left",
        fontsize=10,
    )


def _legend(figure: Figure, timeline: Timeline) -> None:
    schedule = timeline.schedule
    phases = len(schedule.stages[0])
    used = {op.kind for steps in schedule.ranks for step in steps for op in step.parts}
    patches = [
        Patch(color=_COLOURS[kind][min(phase, 2)], label=f"{name}, phase {phase}" if phases > 1 else name)
        for kind, name in _NAMES.items()
        if kind in used
        for phase in range(min(phases, 3))
    ]
    figure.legend(
        handles=[*patches, Patch(color=_IDLE, label="idle")],
        loc="outside lower center",
        ncols=min(len(patches) + 1, 5),
        frameon=False,
        fontsize=8,
        handlelength=1.2,
    )
