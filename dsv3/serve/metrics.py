"""What the engine has done so far, as plain values that any thread may read."""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dsv3.serve.draft_counts import DraftCounts

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Histogram:
    """counts[i] observations in (bounds[i-1], bounds[i]]; the last count has no upper bound."""

    bounds: tuple[float, ...] = _SECONDS
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times


@dataclass
class Metrics(DraftCounts):
    """Gauges of now, then counters since the engine was made."""

    waiting: int = 0
    running: int = 0
    cache_blocks_used: int = 0
    cache_blocks: int = 0
    cache_bytes: int = 0

    requests_finished: dict[str, int] = field(default_factory=dict)  # continuations by finish reason
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0  # of them, found in the prefix cache
    output_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    time_to_first_token: Histogram = field(default_factory=Histogram)
    time_per_token: Histogram = field(default_factory=Histogram)  # of tokens after a continuation's first
    step_seconds: Histogram = field(default_factory=Histogram)
    expert_load: dict[str, list[int]] = field(default_factory=dict)  # by layer name, tokens per expert

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were not computed."""
        return self.cached_prompt_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of a continuation's tokens after its first, which is the prompt's; 0 before there are any."""
        return self.time_per_token.count / self.time_per_token.sum if self.time_per_token.sum else 0.0

    def count_finish(self, reason: str) -> None:
        self.requests_finished[reason] = self.requests_finished.get(reason, 0) + 1

    def snapshot(self) -> dict[str, Any]:
        """All of it as values for JSON."""
        rates = {name: getattr(self, name) for name in ("hit_rate", "tokens_per_second", "acceptance")}
        return {**dataclasses.asdict(self), **rates}
