"""What a person sees while a model trains.

On a terminal: a bar, the clock and the latest numbers, redrawn in place. Anywhere else (a pipe, the log of a
continuous integration): a plain line now and then, without control codes, so that a log stays a log. Nothing
here is a record: what a run keeps is its `metrics.jsonl`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group
from rich.highlighter import ReprHighlighter
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from dsv3.errors import UserError

SECONDS_BETWEEN_LINES = 10.0

# A metric and how it reads; a metric that a step does not have is left out.
_READINGS = (
    ("loss", "loss {:.3f}"),
    ("mtp_loss", "MTP loss {:.3f}"),
    ("max_vio", "MaxVio {:.2f}"),
    ("lr", "lr {:.2e}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
)


class TrainDisplay:
    """Shows a training run's progress; a context manager.

        with TrainDisplay(total_steps=1000) as display:
            display.update(1, {"loss": 8.3, "lr": 1e-4})
            display.log("checkpoint written")

    Of `total_steps` optimizer steps, `start_step` are done already (a resumed run). Where there is no terminal, a
    line is printed every `every` steps, or, if that is None, about every ten seconds; the last step always has
    one. `quiet` prints nothing at all. `stream` is standard output unless given. Raises `UserError` if `every`
    is below 1.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        every: int | None = None,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        if every is not None and every < 1:
            raise UserError(f"'every' is {every}, expected the number of steps between two lines, at least 1")
        self._total_steps = total_steps
        self._step = start_step
        self._every = every
        self._quiet = quiet
        self._stream = sys.stdout if stream is None else stream
        self._metrics: Mapping[str, float] = {}
        self._started = time.monotonic()
        self._first_update: tuple[int, float] | None = None  # its step and time
        self._seconds_left: float | None = None
        self._line_at = float("-inf")  # when the last plain line was printed
        self._line_step = start_step  # the step it was about
        console = Console(file=self._stream, highlight=False)
        # FORCE_COLOR makes rich take a pipe for a terminal; redrawing needs a real one.
        redraws = not quiet and console.is_interactive and self._stream.isatty()
        self._live = Live(get_renderable=self._frame, console=console) if redraws else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.transient = self._first_update is None  # a bar that never moved need not stay
            self._live.stop()
        elif self._line_step != self._step:
            self._print_line()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that `step` optimizer steps are done, the last with `metrics`.

        Shown are loss and mtp_loss (nats a token), max_vio (largest load / mean load - 1), lr and
        tokens_per_second, as far as `metrics` has them; whatever else it has is passed over.
        """
        now = time.monotonic()
        self._step, self._metrics = step, metrics
        # Speed is measured from the first update on: what came before was data, compilation, a resumed run's past.
        first_step, first_time = self._first_update = self._first_update or (step, now)
        if step > first_step:
            self._seconds_left = (now - first_time) / (step - first_step) * max(self._total_steps - step, 0)
        if self._live is None:
            due = now - self._line_at >= SECONDS_BETWEEN_LINES if self._every is None else step % self._every == 0
            if due or step == self._total_steps:
                self._print_line()

    def log(self, message: str) -> None:
        """Prints `message` as it is, above the bar where there is one."""
        if self._live is not None:
            self._live.console.print(message, markup=False, soft_wrap=True)
        elif not self._quiet:
            print(message, file=self._stream, flush=True)

    def _readings(self) -> list[str]:
        return [form.format(self._metrics[name]) for name, form in _READINGS if name in self._metrics]

    def _clock(self) -> str:
        left = "?" if self._seconds_left is None else _hms(self._seconds_left)
        return f"{_hms(time.monotonic() - self._started)} elapsed, {left} left"

    def _percent(self) -> str:
        return f"{self._step / self._total_steps:.0%}"

    def _print_line(self) -> None:
        self._line_at, self._line_step = time.monotonic(), self._step
        parts = [f"step {self._step}/{self._total_steps} ({self._percent()})", *self._readings(), self._clock()]
        self.log("  ".join(parts))

    def _frame(self) -> Group:
        """The live view: one line for how far, one for how well."""
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_column(no_wrap=True, justify="right", style="dim")
        bar.add_row(
            f"step {self._step}/{self._total_steps}",
            ProgressBar(total=self._total_steps, completed=self._step),
            self._percent(),
            self._clock(),
        )
        return Group(bar, ReprHighlighter()("  ".join(self._readings())))


def _hms(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
