"""What is in a checkpoint folder, told from its headers alone: nothing is loaded, whatever the size."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv3.checkpoint.hf_config import load_config
from dsv3.checkpoint.names import canonical_tensors
from dsv3.checkpoint.reader import DTYPES, CheckpointReader, some
from dsv3.checkpoint.source import compare


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """A JSON-able report on the checkpoint folder `path`.

    `config`: the fields of `ModelConfig`. `parameters`: by the config, biases included: `total` of the main
    model, `mtp` on top of it (its copies of embedding and head not counted). `tensors`: groups of one name pattern
    (layer and expert numbers as *), dtype and shape, with `count`, `elements` and `bytes`. `dtypes`: the same by dtype.
    `missing`, `unexpected`, `mismatched`: what a strict load would refuse.
    Raises `UserError` if the folder cannot be read.
    """
    config = load_config(path)
    reader = CheckpointReader(path)
    difference = compare(config, reader)
    infos = {name: reader.info(name) for name in reader}
    groups = Counter((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), info.dtype, info.shape) for name, info in infos.items())
    tensors: list[dict[str, Any]] = []
    dtypes: dict[str, Counter[str]] = {}
    for (name, dtype, shape), count in groups.items():
        size = {"count": count, **_size(dtype, shape, count)}
        tensors.append({"name": name, "dtype": dtype, "shape": list(shape), **size})
        dtypes.setdefault(dtype, Counter()).update(size)
    parameters = {"total": 0, "mtp": 0}
    for tensor in canonical_tensors(config):
        if tensor.copy_of is None:
            parameters["mtp" if tensor.param.startswith("mtp.") else "total"] += math.prod(tensor.shape)
    return {
        "path": str(path),
        "config": dataclasses.asdict(config),
        "parameters": parameters,
        "shards": len(reader.shards),
        "bytes": sum(group["bytes"] for group in tensors),
        "dtypes": {dtype: dict(figures) for dtype, figures in dtypes.items()},
        "tensors": tensors,
        "missing": difference.missing,
        "unexpected": difference.unexpected,
        "mismatched": [
            {"name": name, "expected": list(expected), "found": list(found)}
            for name, expected, found in difference.mismatched
        ],
    }


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """The report of `inspect_checkpoint` as tables."""
    console = console or Console()
    table = Table(title=report["path"], title_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("dtype")
    table.add_column("count", justify="right")
    table.add_column("MB", justify="right")
    for group in report["tensors"]:
        shape = " x ".join(map(str, group["shape"]))
        table.add_row(group["name"], shape, group["dtype"], f"{group['count']:,}", f"{group['bytes'] / 1e6:,.1f}")
    console.print(table)
    for dtype, figures in report["dtypes"].items():
        console.print(f"{dtype}: {figures['count']:,} tensors, {figures['bytes']:,} bytes")
    parameters = report["parameters"]
    console.print(f"{parameters['total']:,} parameters, and {parameters['mtp']:,} in MTP modules")
    console.print(f"{report['bytes']:,} bytes in {report['shards']:,} shards")
    for what in ("missing", "unexpected"):
        if report[what]:
            console.print(f"{len(report[what]):,} {what}: {some(report[what])}", style="bold red")
    for tensor in report["mismatched"]:
        console.print(f"{tensor['name']}: expected {tensor['expected']}, found {tensor['found']}", style="bold red")


def _size(dtype: str, shape: tuple[int, ...], count: int) -> dict[str, int]:
    """Elements and bytes; a dtype that is none of weights' counts 0 bytes."""
    elements = math.prod(shape) * count
    return {"elements": elements, "bytes": elements * DTYPES[dtype].itemsize if dtype in DTYPES else 0}
