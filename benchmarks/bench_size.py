"""Cost against size: a training step over sequence lengths, and over numbers of experts at constant active parameters.

Preset bench in BF16. Lengths: the same number of tokens in fewer, longer sequences; only attention should cost more.
Experts: each token goes to the same number of experts of the same width, of which there are more and more; the step
reads more weights and writes more gradients, and that should be all. So routing is timed by itself too (router,
dispatch and combine, forward and backward, without the experts), and memory is given without weights and gradients.

    python benchmarks/bench_size.py                    # about eight minutes
    python benchmarks/bench_size.py --out size.png     # and a figure
    python benchmarks/bench_size.py --quick            # preset micro, seconds
    python benchmarks/bench_size.py --json             # one JSON object
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_memory import MemoryWatch
from matplotlib.figure import Figure

from dsv3.config import ModelConfig
from dsv3.model.balance import LoadBalancer
from dsv3.model.context import Context
from dsv3.model.experts import DeepSeekMoE
from dsv3.model.transformer import Transformer
from dsv3.train.step import backward_step

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
EXPERTS = (8, 16, 32, 64, 128, 256)


def median_seconds(function: Callable[[], object], rounds: int) -> float:
    """Of `rounds` calls, after one that is not counted."""
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_step(config: ModelConfig, sequences: int, length: int, rounds: int) -> dict[str, float]:
    """Speed and memory of forward and backward, MTP off."""
    model = Transformer(config).bfloat16()
    balancer = LoadBalancer(model)
    tokens_BS1 = torch.randint(config.vocab_size, (sequences, length + 1))

    def step() -> None:
        backward_step(model, balancer, tokens_BS1, micro_batch_size=sequences, mtp_weight=0.0, eos_token_id=None)

    count = sequences * length
    seconds = median_seconds(step, rounds)
    with MemoryWatch() as watch:  # gradients are there by now: what it sees are activations and scratch space
        step()
    return {
        "tokens_per_second": count / seconds,
        "peak_bytes_per_token": watch.peak / count,
        "weight_bytes": float(sum(p.nbytes for p in model.parameters())),
    }


def routing_seconds(config: ModelConfig, tokens: int, rounds: int) -> float:
    """Router, dispatch and combine of one layer, forward and backward: everything about experts but their work."""
    moe = DeepSeekMoE(config).bfloat16()
    for parameter in moe.router.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x_BSD = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    context = Context(cos=torch.empty(0), sin=torch.empty(0), aux_loss_scale=1e-4)

    def run() -> None:
        routing = moe.router(x_BSD, context)
        sent = moe.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
        rows_ND = sent.rows_ND * sent.weights_N.bfloat16().unsqueeze(1)
        moe.dispatcher.combine(rows_ND, sent).backward(x_BSD[0])

    return median_seconds(run, 5 * rounds)


def measure(preset: str, lengths: tuple[int, ...], experts: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Both series, as plain values."""
    torch.manual_seed(0)
    config = ModelConfig.preset(preset).replace(num_nextn_predict_layers=0, max_position_embeddings=max(lengths))
    by_length = []
    for length in lengths:
        print(f"length {length:,} ...", file=sys.stderr)
        by_length.append({"length": length, **measure_step(config, max(lengths) // length, length, rounds)})
    by_experts = []
    for count in experts:
        print(f"{count} experts ...", file=sys.stderr)
        sized = config.replace(n_routed_experts=count)
        row = {"experts": count, **measure_step(sized, 4, lengths[1], rounds)}
        by_experts.append({**row, "routing_ms": 1e3 * routing_seconds(sized, 4 * lengths[1], rounds)})
    return {"preset": preset, "lengths": by_length, "experts": by_experts}


def draw(report: dict[str, Any], path: Path) -> None:
    """Speed and memory, over lengths and over experts."""
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (series, key, label) in enumerate(
        (("lengths", "length", "sequence length"), ("experts", "experts", "routed experts, 4 active"))
    ):
        rows = report[series]
        x = [row[key] for row in rows]
        speed, memory = axes[0][column], axes[1][column]
        speed.plot(x, [row["tokens_per_second"] for row in rows], "o-", color="C0", label="step, tokens/s")
        memory.plot(
            x, [row["peak_bytes_per_token"] / 1024 for row in rows], "o-", color="C2", label="peak, KiB per token"
        )
        memory.set_xscale("log", base=2)
        memory.set_xticks(x, [f"{value:,}" for value in x])
        memory.set_xlabel(label)
        for ax in (speed, memory):
            ax.grid(axis="y", color="0.9")
            ax.spines[["top", "right"]].set_visible(False)
            ax.legend(frameon=False, loc="lower left")
    for row in axes:
        row[0].set_ylim(bottom=0, top=1.15 * max(ax.dataLim.ymax for ax in row))  # of both columns, which share it
    routing = axes[1][1].twinx()
    rows = report["experts"]
    routing.plot([row["experts"] for row in rows], [row["routing_ms"] for row in rows], "s--", color="C1")
    routing.set_ylim(bottom=0)
    routing.set_ylabel("routing of one layer, ms", color="C1")
    routing.spines["top"].set_visible(False)
    title = f"Cost of a training step, preset {report['preset']}, BF16, CPU; memory is without weights and gradients"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="preset micro and short sequences: that it runs")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a PNG to draw")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.quick:
        report = measure("micro", LENGTHS[:2], EXPERTS[:2], args.rounds)
    else:
        report = measure("bench", LENGTHS, EXPERTS, args.rounds)
    if args.out is not None:
        draw(report, args.out)
    if args.json:
        print(json.dumps(report))
        return
    print(f"{'length':>8}{'tokens/s':>12}{'activations, KiB per token':>30}")
    for row in report["lengths"]:
        print(f"{row['length']:8,}{row['tokens_per_second']:12,.0f}{row['peak_bytes_per_token'] / 1024:30.1f}")
    print(f"\n{'experts':>8}{'tokens/s':>12}{'activations, KiB per token':>30}{'routing, ms':>14}{'weights, MiB':>14}")
    for row in report["experts"]:
        print(
            f"{row['experts']:8,}{row['tokens_per_second']:12,.0f}{row['peak_bytes_per_token'] / 1024:30.1f}"
            f"{row['routing_ms']:14.2f}{row['weight_bytes'] / 2**20:14,.0f}"
        )


if __name__ == "__main__":
    main()
