"""What all plans share: they turn into JSON, and their numbers are printed the same way.

Storage and traffic are counted in powers of ten (a KV cache of 70.272 KB a token, a link of 50 GB/s), as papers
and data sheets do; what lies in a GPU is counted in GiB, as the GPU reports it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A result of the planner: a dataclass of plain numbers, strings, dicts and tuples."""

    def to_dict(self) -> dict[str, Any]:
        """Everything in it, ready for `json.dumps`."""
        return dataclasses.asdict(self)


def short(number: float, unit: str = "") -> str:
    """671026419200 -> '671.03 B', with `unit` 'FLOP' '... GFLOP', with 'B' (bytes) '... GB'; powers of 1,000."""
    prefixes = ("", "K", "M", "G", "T", "P", "E") if unit else ("", "K", "M", "B", "T")
    power = 0
    while abs(number) >= 999.995 and power < len(prefixes) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.2f}" if power or number != int(number) else f"{int(number)}"
    return f"{digits} {prefixes[power]}{unit}".strip()


def gib(num_bytes: float) -> str:
    """Bytes as GiB with one decimal, two below 10."""
    value = num_bytes / GIB
    return f"{value:.2f} GiB" if value < 10 else f"{value:.1f} GiB"


def seconds(value: float) -> str:
    """A duration in the unit in which it reads best, from microseconds to days."""
    for limit, scale, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (172_800.0, 1 / 3600, "h")):
        if value < limit:
            return f"{value * scale:.2f} {unit}"
    return f"{value / 86400:.1f} days"


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str | None = None,
    *,
    text_columns: int = 1,
) -> Table:
    """A rich table: the first `text_columns` columns to the left, the others (numbers) to the right."""
    out = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    out.min_width = len(title)  # else a narrow table breaks its title
    for index, column in enumerate(columns):
        out.add_column(column, justify="left" if index < text_columns else "right")
    for row in rows:
        out.add_row(*row)
    return out
