"""The recipe of prepared data. Imports no array library: the command line reads its help from here."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Settings of a preparation; the rate of FIM is the report's.

    Raises `UserError`, naming the setting, if a value is out of range.
    """

    held_out: float = 0.05
    """Share of each source's documents kept out of training."""
    fim_rate: float = 0.1
    """Share of the training documents rearranged to fill in the middle: prefix, suffix, middle."""
    split_rate: float = 0.1
    """Share of the training tokens of punctuation and line end that are split in two (the report states no share)."""
    seed: int = 0
    """Of what is held out, rearranged and split."""
    max_bytes: int | None = None
    """Bytes of text to take from each source at most."""
    shard_tokens: int = 1 << 26
    """Tokens in a shard, about: what a killed preparation does again, and half of what it holds in memory."""

    def __post_init__(self) -> None:
        _require(0 < self.held_out < 1, "held_out", self.held_out, "in (0, 1)")
        for name in ("fim_rate", "split_rate"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        _require(self.max_bytes is None or self.max_bytes >= 1, "max_bytes", self.max_bytes, "at least 1")
        _require(self.shard_tokens >= 1, "shard_tokens", self.shard_tokens, "at least 1")


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise UserError(f"data setting '{name}' is {value!r}, expected {expected}")
