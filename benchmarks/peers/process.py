"""An engine in a process of its own, as the one who asks it sees it; `protocol` is the other side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsv3.errors import UserError

from .environments import last_line
from .protocol import Setup


class Engine:
    """A running engine. Raises `UserError` with its last words when it ends before its time."""

    def __init__(self, peer: str, python: Path, setup: Setup, log: Path) -> None:
        """Start it and wait until its model is loaded. log: where its standard error goes."""
        self.peer, self.setup, self._log = peer, setup, log
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
            )
        self.description = self._read()

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """`new` tokens behind each prompt and the seconds until each was there: `protocol` has the form."""
        assert self._process.stdin
        with suppress(OSError):  # if it has ended, reading says so
            print(json.dumps({"prompts": prompts, "new": new}), file=self._process.stdin, flush=True)
        answer = self._read()
        short = [len(tokens) for tokens in answer["tokens"] if len(tokens) != new]
        if short:
            raise UserError(f"{self.peer} gave {short[0]} tokens where {new} were asked for")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self.peer} ended: {last_line(self._log.read_text(errors='replace'))}")
        answer: dict[str, Any] = json.loads(line)
        return answer
