"""A run's steps, laid out before the first one: how many sequences each takes, from where, at which settings.

All schedules are functions of tokens, so the whole course of a run is a value that can be printed, drawn and
resumed at any step without any other state than the step's number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsv3.train.config import TrainConfig


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    number: int  # 1 is the first
    first_sequence: int  # of the run's endless order of sequences
    sequences: int
    tokens: int  # seen by the run when this step is done
    learning_rate: float
    mtp_weight: float
    bias_update_speed: float


def timetable(config: TrainConfig) -> Iterator[Step]:
    """The steps of a run, in order, until `config.tokens` are seen (the last step may see a few more).

    The batch has the size scheduled for the tokens before the step, rounded down to whole micro-batches; the other
    settings are those at the tokens behind it, so that a warm-up from 0 does not waste its first step.
    """
    schedules = config.schedules
    number = sequences_done = 0
    while (tokens_done := sequences_done * config.seq_len) < schedules.total_tokens:
        size = int(schedules.batch_size(tokens_done))
        if config.micro_batch_size is not None:
            size -= size % config.micro_batch_size
        size = max(size, config.micro_batch_size or 1)
        tokens = tokens_done + size * config.seq_len
        number += 1
        yield Step(
            number,
            sequences_done,
            size,
            tokens,
            schedules.learning_rate(tokens),
            schedules.mtp_weight(tokens),
            schedules.bias_update_speed(tokens),
        )
        sequences_done += size
