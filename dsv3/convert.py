"""`dsv3 convert`: a checkpoint in another precision, with a bar while it runs and a report of what changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.locate import find_checkpoint
from dsv3.checkpoint.verify import verify as compare_predictions


def convert_checkpoint(
    source: Path, target: Path, *, dtype: str, fp8: bool, overwrite: bool, verify: bool, as_json: bool
) -> None:
    """Convert, then compare predictions if asked, and print what came of it. Raises `UserError` as `convert` does."""
    console = Console(stderr=as_json)
    folder = find_checkpoint(source)
    with console.status(f"converting {folder}"):
        convert(folder, target, dtype=None if dtype == "keep" else getattr(torch, dtype), fp8=fp8, overwrite=overwrite)
    report: dict[str, Any] = {"source": str(folder), "target": str(target)}
    if verify:
        with console.status("comparing predictions"):
            report["kl"] = compare_predictions(folder, target)
    if as_json:
        print(json.dumps(report))
        return
    console.print(f"wrote {target}", highlight=False, soft_wrap=True)
    if verify:
        table = Table("head", "mean KL (nats)", "largest KL", "same likeliest token")
        for head, figures in report["kl"].items():
            row = (f"{figures['kl_mean']:.3g}", f"{figures['kl_max']:.3g}", f"{figures['top1_agreement']:.1%}")
            table.add_row(head, *row)
        console.print(table)
