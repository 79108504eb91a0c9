"""The planner's memory against the measured peak of real training steps, on one device.

Counts every storage allocated while a model, its optimizer and two whole steps run (the second has the moments), and
compares the peak with `plan_memory` for the same layout. FP32 on a CPU, since there BF16 norms keep FP32 copies that
a GPU's kernels do not. The ratio measured / planned comes last for each case; within 10 % is the aim.

    python benchmarks/bench_plan_memory.py            # a few shapes, a minute
    python benchmarks/bench_plan_memory.py --json     # one JSON object
"""

from __future__ import annotations

import argparse
import json

import torch
from bench_memory import MemoryWatch

from dsv3.config import ModelConfig
from dsv3.model.balance import LoadBalancer
from dsv3.model.transformer import Recompute, Transformer
from dsv3.plan.memory import Layout, plan_memory
from dsv3.train.optim import MasterAdamW
from dsv3.train.step import backward_step

CASES: list[tuple[str, int, int, Recompute]] = [
    ("nano", 16, 256, "none"),
    ("nano", 16, 256, "full"),
    ("bench", 2, 512, "none"),
    ("bench", 2, 512, "full"),
]


def measured_peak(config: ModelConfig, sequences: int, seq_len: int, recompute: Recompute) -> int:
    """Bytes alive at the fullest moment of two steps, model and optimizer included."""
    tokens_BS1 = torch.randint(2, config.vocab_size, (sequences, seq_len + 1))
    with MemoryWatch() as watch:
        model = Transformer(config)
        model.recompute = recompute
        optimizer, balancer = MasterAdamW(model), LoadBalancer(model)
        for _ in range(2):
            backward_step(model, balancer, tokens_BS1, micro_batch_size=sequences, mtp_weight=0.3, eos_token_id=None)
            optimizer.step(1e-3, 1.0)
            balancer.update(0.001)
    return watch.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for preset, sequences, seq_len, recompute in CASES:
        config = ModelConfig.preset(preset)
        layout = Layout(micro_batch=sequences, sequence_length=seq_len, precision="fp32", recompute=recompute)
        planned = plan_memory(config, layout).fullest_bytes
        measured = measured_peak(config, sequences, seq_len, recompute)
        rows.append({"case": f"{preset} {sequences} x {seq_len} {recompute}", "planned": planned, "measured": measured})
    for row in rows:
        row["ratio"] = row["measured"] / row["planned"]
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        planned, measured = row["planned"] / 2**20, row["measured"] / 2**20
        print(f"{row['case']:24} planned {planned:8.1f} MiB  measured {measured:8.1f} MiB  ratio {row['ratio']:.3f}")


if __name__ == "__main__":
    main()
