"""A process that waits too long for another says what it is doing.

A collective that one process does not join leaves all others waiting, and when they give up nobody knows any more who
was missing. So a while before, every process writes one sentence to stderr: who it is, how far it has come, and the
call it is in; its stack follows. The late one is the process that waits for nobody, or is at an earlier step or
operation than the others.

On a GPU a collective is only queued: what is told there is where the host waits for it.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TextIO

# Of the time until the stack is written, when the sentence is. The stack comes from a timer that needs nothing of
# Python, the sentence from a thread, which a process that hangs in foreign code may not let run.
_SENTENCE_AT = 0.9


class Watch:
    """Reports for `who` ("rank 3") if `seconds` pass after a `beat` without another one. file: None is stderr."""

    def __init__(self, who: str, seconds: float, file: TextIO | None = None) -> None:
        self._who, self._seconds, self._file = who, seconds, file
        self._thread = threading.get_ident()
        self._timer: threading.Timer | None = None

    def beat(self, doing: Callable[[], str]) -> None:
        """Say that things go on. doing: asked, from another thread, when they do not: where in its work it is."""
        self.stop()
        faulthandler.dump_traceback_later(self._seconds, file=self._stream())
        self._timer = threading.Timer(_SENTENCE_AT * self._seconds, self._report, (doing,))
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Nothing more is expected of this process."""
        if self._timer is not None:
            self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _report(self, doing: Callable[[], str]) -> None:
        call = current_call(sys._current_frames()[self._thread])
        seconds = _SENTENCE_AT * self._seconds
        print(
            f"{self._who} has made no progress for {seconds:.0f} seconds: {doing()}; {call}",
            file=self._stream(),
            flush=True,
        )

    def _stream(self) -> TextIO:
        return self._file or sys.__stderr__ or sys.stderr


def current_call(frame: FrameType | None) -> str:
    """In words, what a thread is in: its innermost function of dsv3, and what of torch.distributed that has called."""
    waiting_in = None
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith("dsv3."):
            place = f"{frame.f_code.co_qualname} ({module}, line {frame.f_lineno})"
            return f"in {place}" if waiting_in is None else f"in torch.distributed's {waiting_in}, called by {place}"
        # The innermost says most: FSDP2 calls collectives from within. (A logger is wrapped around all of them.)
        if waiting_in is None and module.startswith("torch.distributed") and not module.endswith("c10d_logger"):
            waiting_in = function
        frame = frame.f_back
    return "in no function of dsv3"
