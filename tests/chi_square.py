"""The one test of significance that the suite needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def chi_square_p(observed: Sequence[int], probabilities: Sequence[float]) -> float:
    """Pearson's test: how likely counts at least this far from `probabilities` are. Rare outcomes are pooled."""
    total = sum(observed)
    assert abs(sum(probabilities) - 1) < 1e-4
    if any(count and not p for count, p in zip(observed, probabilities, strict=True)):
        return 0.0  # the impossible happened
    cells, rare = [], [0.0, 0.0]
    for count, p in zip(observed, probabilities, strict=True):
        if total * p >= 5:
            cells.append((count, total * p))
        else:
            rare = [rare[0] + count, rare[1] + total * p]
    if rare[1] > 0:
        cells.append((rare[0], rare[1]))
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    if freedom == 0:
        return 1.0  # only one outcome is possible, and it is what came
    return float(torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)))
