"""Values that change while a model trains, as functions of the *tokens* seen: learning rate, batch size, gamma, lambda.

A schedule is written as a start value and segments, one after another:

    0, linear 2.2e-4 25B, hold 10T, cosine 2.2e-5 4.3T, hold 333B, set 7.3e-6

is the report's learning rate (section 4.2). Lengths are tokens (K, M, B, T for powers of a thousand) or shares of
the whole run (5%); behind the last segment its value holds. A single number is a constant.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass

from dsv3.errors import UserError

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_GRAMMAR = "a number, then segments 'linear VALUE LENGTH', 'cosine VALUE LENGTH', 'hold LENGTH' or 'set VALUE'"


@dataclass(frozen=True)
class Segment:
    """From `start` tokens on for `length`, the value goes from `begin` to `end`."""

    kind: str  # linear, cosine or hold
    start: float
    length: float
    begin: float
    end: float

    def value(self, tokens: float) -> float:
        """At `tokens`, held at the ends outside of the segment."""
        share = min(max((tokens - self.start) / self.length, 0.0), 1.0) if self.length else 1.0
        if self.kind == "cosine":
            share = 0.5 * (1 - math.cos(math.pi * share))
        return self.begin + (self.end - self.begin) * share


@dataclass(frozen=True)
class Schedule:
    """A value as a function of tokens seen; call it."""

    initial: float
    segments: tuple[Segment, ...]

    def __call__(self, tokens: float) -> float:
        index = bisect_right([segment.start for segment in self.segments], tokens)
        return self.segments[index - 1].value(tokens) if index else self.initial

    @property
    def boundaries(self) -> list[float]:
        """Tokens at which a segment ends."""
        return [segment.start + segment.length for segment in self.segments]


def parse_schedule(text: str, total_tokens: int, name: str = "schedule") -> Schedule:
    """Read the notation above; percentages are of `total_tokens`. Raises `UserError`, naming the setting `name`."""
    first, *rest = (part.split() for part in text.split(","))
    if len(first) != 1:
        raise UserError(f"setting '{name}' is {text!r}, expected {_GRAMMAR}")
    value = initial = _number(first[0], name, text)
    at = 0.0
    segments: list[Segment] = []
    for words in rest:
        match words:
            case ["linear" | "cosine" as kind, target, length]:
                end = _number(target, name, text)
                segment = Segment(kind, at, _length(length, total_tokens, name, text), value, end)
            case ["hold", length]:
                segment = Segment("hold", at, _length(length, total_tokens, name, text), value, value)
            case ["set", target]:
                end = _number(target, name, text)
                segment = Segment("hold", at, 0.0, end, end)
            case _:
                raise UserError(f"setting '{name}' has the segment {' '.join(words)!r}, expected {_GRAMMAR}")
        segments.append(segment)
        value, at = segment.end, at + segment.length
    return Schedule(initial, tuple(segments))


def parse_tokens(text: str, name: str) -> int:
    """A positive whole number of tokens such as '1.6M' or '14.8T'. Raises `UserError`, naming the setting."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([KMBT]?)", text.strip())
    try:
        tokens = round(float(match[1]) * _SUFFIX[match[2]]) if match else 0
    except ValueError:
        tokens = 0
    if tokens < 1:
        raise UserError(f"setting '{name}' is {text!r}, expected a number of tokens such as 500K, 1.6M or 14.8T")
    return tokens


def _length(text: str, total_tokens: int, name: str, whole: str) -> float:
    if text.endswith("%"):
        share = _number(text[:-1], name, whole) / 100
        if not 0 <= share <= 1:
            raise UserError(f"setting '{name}' is {whole!r}, in which {text} is no share of a run (0% to 100%)")
        return share * total_tokens
    return float(parse_tokens(text, name))


def _number(text: str, name: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"setting '{name}' is {whole!r}, in which {text!r} is no number >= 0: expected {_GRAMMAR}")
    return value
