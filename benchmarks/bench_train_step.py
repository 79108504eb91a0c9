"""Speed of a training step (forward and backward) against transformers' DeepseekV3ForCausalLM.

Both models hold the same weights and see the same tokens, in turn, in one process: round by round, so that a machine
whose speed drifts does so for both. The peer runs in each of its dtypes and experts implementations; the ratio printed
last is ours at its best to the peer at its best, by medians. MTP is off (the peer has none in training). Beside it: the
share of this machine's own rate on a 4096-cube matrix product that the step's matrix FLOPs reach.

    python benchmarks/bench_train_step.py             # preset bench, 4 x 512 tokens
    python benchmarks/bench_train_step.py --json      # one JSON object
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DeepseekV3ForCausalLM

from dsv3.checkpoint.pretrained import save_pretrained
from dsv3.config import ModelConfig
from dsv3.model.balance import LoadBalancer
from dsv3.model.transformer import Transformer
from dsv3.train.step import backward_step
from dsv3.train.throughput import measure_gemm_rate, step_flops

# Not batched_mm: it gathers a copy of the weights for every (token, expert) pair, 13 GB here in FP32.
EXPERTS = ("eager", "grouped_mm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def our_step(model: Transformer, dtype: torch.dtype, tokens: torch.Tensor) -> Callable[[], float]:
    """Loss, auxiliary loss, counting of loads and all gradients, as the trainer runs them."""
    model = model.to(dtype)
    balancer = LoadBalancer(model)

    def step() -> float:
        model.zero_grad()
        losses = backward_step(model, balancer, tokens, micro_batch_size=len(tokens), mtp_weight=0.0, eos_token_id=None)
        return losses.main

    return step


def their_step(folder: Path, dtype: torch.dtype, experts: str, tokens: torch.Tensor) -> Callable[[], float]:
    """Their loss and its gradients."""
    model = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation=experts, attn_implementation="sdpa"
    )
    model.train()

    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        model.zero_grad()
        loss = model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        return float(loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bench")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    config = ModelConfig.preset(args.preset).replace(num_nextn_predict_layers=0)
    torch.manual_seed(0)
    model = Transformer(config)
    tokens = torch.randint(0, config.vocab_size, (args.batch, args.seq_len + 1))
    steps: dict[str, Callable[[], float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model")
        for name, dtype in DTYPES.items():
            ours = Transformer(config)
            ours.load_state_dict(model.state_dict())
            steps[f"dsv3 {name}"] = our_step(ours, dtype, tokens)
            for experts in EXPERTS:
                steps[f"transformers {name} {experts}"] = their_step(Path(folder) / "model", dtype, experts, tokens)

    losses, failed = {}, {}
    for name, step in list(steps.items()):
        try:
            losses[name] = step()  # warm-up, and the proof that all compute the same
        except RuntimeError as error:
            failed[name] = str(error).splitlines()[0]
            del steps[name]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)

    count = args.batch * args.seq_len
    rates = {name: count / statistics.median(times) for name, times in seconds.items()}
    best = {
        who: max((n for n in rates if n.startswith(who)), key=rates.__getitem__) for who in ("dsv3", "transformers")
    }
    gemm = measure_gemm_rate(torch.device("cpu"), torch.bfloat16, budget=30.0)
    achieved = step_flops(config, args.batch, args.seq_len, mtp=False) / count * rates[best["dsv3"]]
    report = {
        "preset": args.preset,
        "tokens_per_second": rates,
        "losses": losses,
        "failed": failed,
        "gemm_gflops_bf16": gemm / 1e9,
        "gflops": achieved / 1e9,
        "gemm_share": achieved / gemm,
        "ratio": rates[best["dsv3"]] / rates[best["transformers"]],
    }
    if args.json:
        print(json.dumps(report))
        return
    for name, rate in rates.items():
        print(f"{name:36} {rate:8.0f} tokens/s   loss {losses[name]:.4f}")
    for name, reason in failed.items():
        print(f"{name:36} failed: {reason}")
    share = f"{achieved / gemm:.0%} of this machine's BF16 GEMM ({gemm / 1e9:.0f} GFLOP/s)"
    print(f"ours: {achieved / 1e9:.0f} GFLOP/s, {share}")
    print(f"ratio {best['dsv3']} / {best['transformers']}: {report['ratio']:.2f}")


if __name__ == "__main__":
    main()
