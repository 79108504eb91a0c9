"""Rates of the CPU's products with a weight, plain, packed and quantised, by number of rows.

Weights of the size of a small model's map and of its head, random, one thread. Each figure is the median of rounds in
which all ways take turns, so that a machine busy with other things is unfair to none; it is still slower than an idle
one. GB/s counts the weight as it is stored (BF16 2 bytes, int8 1, int4 0.625), once for each product.

    python benchmarks/bench_packed.py
    python benchmarks/bench_packed.py --rounds 31 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.ops.packed import PackedWeight, can_pack
from dsv3.ops.quantized import Int4Weight, Int8DynamicWeight, Int8Weight

SHAPES = {"512x512": (512, 512), "head 129280x512": (129280, 512)}
KINDS = {"int8": (Int8Weight, 1.0), "int4": (Int4Weight, 0.625), "int8-dynamic": (Int8DynamicWeight, 1.0)}


def ways_to_multiply(weight_OI: Tensor) -> dict[str, tuple[Callable[[Tensor], Tensor], float]]:
    """By name: x -> x W^T, and bytes for each weight."""
    ways: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {"F.linear": (lambda x: F.linear(x, weight_OI), 2.0)}
    if can_pack(weight_OI):
        ways["packed BF16"] = (PackedWeight(weight_OI).linear, 2.0)
    for name, (kind, num_bytes) in KINDS.items():
        if kind.available():
            ways[name] = (kind(kind.quantize(weight_OI)).linear, num_bytes)
    return ways


def median_seconds(ways: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Of one call each; a round calls each way for some milliseconds."""
    seconds: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()
    for _ in range(rounds):
        for way, found in zip(ways, seconds, strict=True):
            calls, start = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - start < 0.003:
                way()
                calls += 1
            found.append((time.perf_counter() - start) / calls)
    return [statistics.median(found) for found in seconds]


@torch.inference_mode()
def measure(shape: tuple[int, int], rows: Sequence[int], rounds: int) -> list[dict[str, object]]:
    weight_OI = torch.randn(shape).bfloat16()
    ways = ways_to_multiply(weight_OI)
    report: list[dict[str, object]] = []
    for count in rows:
        x_NI = torch.randn(count, shape[1]).bfloat16()
        seconds = median_seconds([lambda way=way, x=x_NI: way(x) for way, _ in ways.values()], rounds)
        for (name, (_, num_bytes)), each in zip(ways.items(), seconds, strict=True):
            gigabytes = weight_OI.numel() * num_bytes / 1e9
            report.append({"way": name, "rows": count, "us": each * 1e6, "gb_per_s": gigabytes / each})
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = {name: measure(shape, args.rows, args.rounds) for name, shape in SHAPES.items()}
    if args.json:
        print(json.dumps(report))
        return
    for name, lines in report.items():
        print(f"\n{name}: us (GB/s of weights)\n")
        print("| rows | " + " | ".join(str(count) for count in args.rows) + " |")
        print("|---|" + "---:|" * len(args.rows))
        for way in dict.fromkeys(line["way"] for line in lines):
            cells = [f"{line['us']:,.0f} ({line['gb_per_s']:.0f})" for line in lines if line["way"] == way]
            print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
