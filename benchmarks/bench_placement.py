"""Expert placement: how evenly, how fast, with how much traffic and how few moves, on one core.

Ours is `place_experts`; the peer is the public algorithm (EPLB) as `rebalance_experts` computes it, vectorised. Both
place the 58 MoE layers of DeepSeek-V3, 256 experts each, under the same loads. Columns: load of the busiest GPU over
the mean (mean over layers), nodes a token reaches per group of experts it visits, slots that hold an expert twice on a
GPU, CPU seconds (median), replicas moved when the loads have drifted by 10 % and are placed anew; last the ratio of the
busiest GPUs, ours over the peer's (mean over layers).
Loads are made up: lognormal as in trained models, Zipf and one hot expert as extremes, groups that are hot as a whole.

    python benchmarks/bench_placement.py            # a minute
    python benchmarks/bench_placement.py --quick    # 4 layers, seconds
    python benchmarks/bench_placement.py --json     # one JSON object
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # one core: before numpy starts threads of its own
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

from dsv3.plan.placement import Placement, place_experts, rebalance_experts

EXPERTS = 256
SHAPES = {
    "288 on 32 (prefill)": {"num_replicas": 288, "num_groups": 8, "num_nodes": 4, "num_gpus": 32},
    "320 on 320 (decode)": {"num_replicas": 320, "num_groups": 8, "num_nodes": 40, "num_gpus": 320},
    "288 on 144 (online decode)": {"num_replicas": 288, "num_groups": 8, "num_nodes": 18, "num_gpus": 144},
}


def make_loads(layers: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Loads [layers, EXPERTS] by the name of their distribution."""
    zipf = 1 / np.arange(1, EXPERTS + 1)
    one_hot = rng.lognormal(0, 0.3, (layers, EXPERTS))
    one_hot[np.arange(layers), rng.integers(EXPERTS, size=layers)] *= 60
    groups = rng.lognormal(0, 0.5, (layers, 8, 1)) * rng.lognormal(0, 0.5, (layers, 8, EXPERTS // 8))
    return {
        "uniform": rng.random((layers, EXPERTS)),
        "lognormal 0.5": rng.lognormal(0, 0.5, (layers, EXPERTS)),
        "lognormal 1": rng.lognormal(0, 1, (layers, EXPERTS)),
        "hot groups": groups.reshape(layers, EXPERTS),
        "zipf": np.stack([rng.permutation(zipf) for _ in range(layers)]),
        "one hot": one_hot,
    }


def timed(function: Callable[[], Any], runs: int) -> tuple[Any, float]:
    """What `function` returns, and the median of its CPU seconds: one thread, so seconds on a core of its own."""
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return result, statistics.median(seconds)


def measure(weight: np.ndarray, shape: dict[str, int], runs: int, rng: np.random.Generator) -> dict[str, float]:
    """One row of the table."""
    ours, seconds = timed(lambda: place_experts(weight, **shape), runs)
    (slots, _, _), public_seconds = timed(lambda: rebalance_experts(weight, **shape), runs)
    public = Placement.of(slots, EXPERTS, ours.cluster)
    drifted = weight * rng.lognormal(0, 0.1, weight.shape)
    again, again_seconds = timed(lambda: place_experts(drifted, current=ours.physical_to_logical, **shape), runs)
    (public_slots, _, _) = rebalance_experts(drifted, **shape)
    public_again = Placement.of(public_slots, EXPERTS, ours.cluster)
    replicas = weight.shape[0] * shape["num_replicas"]
    ratio = ours.gpu_load(weight).max(axis=1) / public.gpu_load(weight).max(axis=1)
    return {
        "imbalance": float(ours.imbalance(weight).mean()),
        "public_imbalance": float(public.imbalance(weight).mean()),
        "busiest_ratio": float(ratio.mean()),
        "worst_busiest_ratio": float(ratio.max()),
        "nodes_per_visit": float(ours.nodes_per_visit(weight).mean()),
        "public_nodes_per_visit": float(public.nodes_per_visit(weight).mean()),
        "duplicates": int(ours.duplicates().sum()),
        "public_duplicates": int(public.duplicates().sum()),
        "seconds": seconds,
        "public_seconds": public_seconds,
        "drift_imbalance": float(again.imbalance(drifted).mean()),
        "drift_seconds": again_seconds,
        "moved": float(again.moves_from(ours.physical_to_logical).sum() / replicas),
        "public_moved": float(public_again.moves_from(slots).sum() / replicas),
    }


def show(name: str, rows: dict[str, dict[str, float]]) -> None:
    """One shape's table; in every column ours first, then the public algorithm."""
    print(f"\n{name}: ours / public")
    print(f"{'loads':14} {'busiest/mean':>17} {'nodes/visit':>14} {'twice':>10} {'seconds':>15} {'moved':>18} ratio")
    for loads, row in rows.items():
        print(
            f"{loads:14} {row['imbalance']:8.4f} /{row['public_imbalance']:7.4f}"
            f" {row['nodes_per_visit']:6.2f} /{row['public_nodes_per_visit']:6.2f}"
            f" {row['duplicates']:4d} /{row['public_duplicates']:4d}"
            f" {row['seconds']:6.3f} /{row['public_seconds']:7.4f}"
            f" {row['moved']:9.1%} /{row['public_moved']:7.1%} {row['busiest_ratio']:.4f}"
        )


def main() -> None:
    """Measures all shapes and loads, and prints them."""
    parser = argparse.ArgumentParser(description="expert placement against the public algorithm")
    parser.add_argument("--quick", action="store_true", help="4 layers, one run each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    layers, runs = (4, 1) if options.quick else (58, 5)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, shape in SHAPES.items():
        rng = np.random.default_rng(options.seed)
        results[name] = {loads: measure(weight, shape, runs, rng) for loads, weight in make_loads(layers, rng).items()}
        if not options.json:
            show(name, results[name])
    rows = [row for table in results.values() for row in table.values()]
    summary = {
        "median_seconds": statistics.median(row["seconds"] for row in rows),
        "slowest_seconds": max(row["seconds"] for row in rows),
        "slowest_seconds_from_current": max(row["drift_seconds"] for row in rows),
        "worst_busiest_ratio": max(row["worst_busiest_ratio"] for row in rows),
        "mean_busiest_ratio": statistics.mean(row["busiest_ratio"] for row in rows),
    }
    if options.json:
        print(json.dumps({"layers": layers, "runs": runs, "shapes": results, "summary": summary}))
        return
    print(
        f"\nseconds: median {summary['median_seconds']:.3f}, slowest {summary['slowest_seconds']:.3f}, "
        f"from a current placement at most {summary['slowest_seconds_from_current']:.3f}; {layers} layers, one core"
    )
    print(
        f"busiest GPU, ours / public: mean {summary['mean_busiest_ratio']:.4f}, "
        f"worst layer {summary['worst_busiest_ratio']:.4f}"
    )


if __name__ == "__main__":
    main()
