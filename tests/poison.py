"""Uninitialised memory made visible: what was never written is NaN, not by luck the zero that was there before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` and its relatives give NaN (the largest value for integers)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.zeros(3)).isnan().all()
        assert torch.zeros(1).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
