"""What a person sees while data is prepared.

On a terminal a bar for the stage that runs, anywhere else a plain line now and then, so that a log stays a log.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich import progress as bars
from rich.console import Console

from dsv3.data.prepare import Progress

SECONDS_BETWEEN_LINES = 10.0


class PrepareDisplay:
    """Shows a preparation's progress; a context manager, of which `prepare` takes the two methods.

        with PrepareDisplay() as display:
            prepare(spec, folder, 4096, report=display.report, advance=display.advance)

    `quiet` prints nothing at all. `stream` is standard output unless given.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._stream = sys.stdout if stream is None else stream
        # FORCE_COLOR makes rich take a pipe for a terminal; redrawing needs a real one.
        self._redraws = not quiet and self._stream.isatty()
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TextColumn("{task.percentage:>3.0f}%"),
            bars.TextColumn("{task.fields[numbers]}"),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            console=Console(file=self._stream, highlight=False),
            transient=True,
            disable=not self._redraws,
        )
        self._task: bars.TaskID | None = None
        self._stage = ""
        self._line_at = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def report(self, message: str) -> None:
        """Prints `message` as it is, above the bar where there is one."""
        if self._redraws:
            self._bar.console.print(message, markup=False, soft_wrap=True)
        elif not self._quiet:
            print(message, file=self._stream, flush=True)

    def advance(self, progress: Progress) -> None:
        """Shows how far a stage is: its share where the end is known, bytes of text, and tokens if it makes any."""
        numbers = f"{progress.text_bytes / 1e6:,.1f} MB"
        if progress.tokens:
            numbers += f", {progress.tokens:,} tokens"
        if self._redraws:
            if self._task is None or progress.stage != self._stage:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(progress.stage, total=progress.total_bytes, numbers=numbers)
                self._stage = progress.stage
            self._bar.update(self._task, completed=progress.text_bytes, numbers=numbers, refresh=True)
        elif time.monotonic() - self._line_at >= SECONDS_BETWEEN_LINES:
            self._line_at = time.monotonic()
            share = f" ({progress.text_bytes / progress.total_bytes:.0%})" if progress.total_bytes else ""
            self.report(f"{progress.stage}{share}: {numbers}")
