"""An engine in a process of its own, as the one who asks it sees it; `protocol` is the other side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsv3.errors import UserError

from .environments import last_line
from .protocol import Setup

PATIENCE = 1200.0  # seconds: vLLM compiles for minutes, and the machine may be a slow one


class Engine:
    """A running engine. Raises `UserError` with its last words when it ends before its time or does not answer."""

    def __init__(self, peer: str, python: Path, setup: Setup, log: Path, patience: float = PATIENCE) -> None:
        """Start it and wait until its model is loaded. log: where its standard error goes.

        patience: seconds after which an engine that is loading or at a task is given up.
        """
        self.peer, self.setup, self._log, self._patience = peer, setup, log, patience
        runner = Path(__file__).with_name(f"run_{peer}.py")
        environment = os.environ | {"OMP_NUM_THREADS": str(setup.threads)}
        if python != Path(sys.executable):
            environment.pop("PYTHONPATH", None)
        with log.open("w") as log_file:
            self._process = subprocess.Popen(
                [python, runner, setup.to_argument()],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
                start_new_session=True,  # what it starts ends with it
            )
        self.description = self._answer_to("")

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """`new` tokens behind each prompt and the seconds until each was there: `protocol` has the form."""
        answer = self._answer_to(json.dumps({"prompts": prompts, "new": new}) + "\n")
        short = [len(tokens) for tokens in answer["tokens"] if len(tokens) != new]
        if short:
            raise UserError(f"{self.peer} gave {short[0]} tokens where {new} were asked for")
        return answer

    def close(self) -> None:
        """End the process and those it has started."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answer_to(self, task: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        given_up = threading.Event()

        def give_up() -> None:
            given_up.set()
            self.close()  # which ends the waiting below

        timer = threading.Timer(self._patience, give_up)
        timer.start()
        try:
            with suppress(OSError):  # if it has ended, reading says so
                self._process.stdin.write(task)
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            self.close()
            how = f"gave no answer for {self._patience:g} s" if given_up.is_set() else "ended"
            raise UserError(f"{self.peer} {how}: {last_line(self._log.read_text(errors='replace'))}")
        answer: dict[str, Any] = json.loads(line)
        return answer
