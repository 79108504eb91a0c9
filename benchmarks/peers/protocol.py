"""How a benchmark talks to an engine in a process of its own: one JSON object a line, in and out.

Every engine runs in an environment that may hold nothing of ours, so this file needs the standard library only. A
runner loads its model, says what it is and how it is set up, then answers tasks until its input ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

Prompts = list[list[int]]
Emit = Callable[[int, list[int]], None]  # number of the prompt, its next tokens: to be called as soon as they are there
Generate = Callable[[Prompts, int, Emit], None]  # so many tokens behind each prompt, greedily, whatever the tokens are


@dataclass(frozen=True)
class Setup:
    """What every engine is told."""

    model: str  # a Hugging Face folder in BF16
    weights: str  # "bf16", "int8" or "fp32", whichever of these the engine has
    threads: int
    sequences: int  # that run at a time
    length: int  # prompt and output of one sequence
    prefill: int  # prompt tokens that an engine which mixes prompts with decoding may take into one step

    def to_argument(self) -> str:
        """What a runner is started with."""
        return json.dumps(asdict(self))


def run(load: Callable[[Setup], tuple[Generate, dict[str, Any]]]) -> None:
    """The main function of a runner. `load` returns what generates and a description: version, settings."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not get between
    generate, description = load(Setup(**json.loads(sys.argv[1])))
    print(json.dumps(description), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(_answer(generate, task["prompts"], task["new"])), file=answers, flush=True)


def _answer(generate: Generate, prompts: Prompts, new: int) -> dict[str, Any]:
    """The tokens behind each prompt, and for each of them the seconds from the beginning to when it was there."""
    tokens: list[list[int]] = [[] for _ in prompts]
    seconds: list[list[float]] = [[] for _ in prompts]
    start = time.perf_counter()

    def emit(index: int, ids: list[int]) -> None:
        tokens[index] += ids
        seconds[index] += [time.perf_counter() - start] * len(ids)

    generate(prompts, new, emit)
    return {"tokens": tokens, "seconds": seconds}
