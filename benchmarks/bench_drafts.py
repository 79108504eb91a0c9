"""What MTP drafts gain: tokens a second with 0, 1 and 2 drafts a step, where a known share of them stands.

A trained model's acceptance is what its training made of it. Here it is set: every block adds nothing to the residual
stream (its output projections are zero), so that the next token is a permutation of the present one, and the MTP
modules know the same permutation but for a share of the tokens, behind which they are wrong. Everything is computed as
in any other model of that shape: zeros take a matrix product as long as other numbers, and routers see what they would.

Greedy, weights packed, one model and one set of prompts for all; rounds interleaved, medians, the ratio printed last.

    python benchmarks/bench_drafts.py                       # preset bench, BF16, batch 1, 4 and 16
    python benchmarks/bench_drafts.py --model out/demo      # a trained model instead, with the acceptance that it has
    python benchmarks/bench_drafts.py --preset bench-576 --acceptance 0.8 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.model.experts import Experts, SwiGLU
from dsv3.model.mla import MultiHeadLatentAttention
from dsv3.model.transformer import Transformer
from dsv3.serve.engine import Engine
from dsv3.serve.engine_config import EngineConfig
from dsv3.serve.load import load_model
from dsv3.serve.pack import pack_weights
from dsv3.serve.params import SamplingParams

_NEW_TOKENS = 96
_PROMPT = 64


@torch.no_grad()
def model_of_acceptance(config: ModelConfig, share: float) -> Transformer:
    """A model whose MTP modules are right behind a share of all tokens, and wrong behind the others."""
    model = Transformer(config)
    for module in model.modules():
        if isinstance(module, MultiHeadLatentAttention):
            module.o_proj.weight.zero_()
        elif isinstance(module, (SwiGLU, Experts)):
            projection = module.down_proj
            (projection if isinstance(projection, Tensor) else projection.weight).zero_()
    # A token's successor has the row of the head that looks most like the token's embedding. The first number of an
    # embedding tells the modules, and nobody else, whether to be wrong: they add a vector that is no successor's.
    V, D = config.vocab_size, config.hidden_size
    model.embed_tokens.weight.normal_()
    wrong_V = torch.arange(V) >= round(share * V)
    successor_V = torch.randperm(V)
    model.lm_head.weight[successor_V] = model.embed_tokens.weight
    model.lm_head.weight[:, 0] = 0
    model.embed_tokens.weight[:, 0] = wrong_V.float()
    for module in model.mtp:
        module.eh_proj.weight.zero_()
        module.eh_proj.weight[:, :D] = torch.eye(D)
        module.eh_proj.weight[:, 0] += 20 * torch.randn(D)
    return model


def decoding_speed(model: Transformer, prompts: list[list[int]], draft_tokens: int) -> tuple[float, float]:
    """(tokens a second while all decode, share of the drafts that stood)."""
    room = len(prompts) * (len(prompts[0]) + _NEW_TOKENS + 16)
    settings = EngineConfig(
        draft_tokens=draft_tokens, adaptive_drafting=False, cache_tokens=room, max_prefill_tokens=room
    )
    engine = Engine(model, None, settings)
    for prompt in prompts:
        engine.add(prompt, SamplingParams(max_tokens=_NEW_TOKENS, ignore_eos=True))
    engine.step()  # the prompts and everybody's first token
    known, start = engine.metrics.output_tokens, time.perf_counter()
    while engine.metrics.running == len(prompts):
        engine.step()
    seconds = time.perf_counter() - start
    return (engine.metrics.output_tokens - known) / seconds, engine.metrics.acceptance


def compare(model: Transformer, batches: list[int], rounds: int) -> dict[int, Any]:
    """By batch and number of drafts: tokens a second, acceptance, and the speed over that without drafts."""
    report: dict[int, Any] = {}
    for batch in batches:
        prompts = torch.randint(model.config.vocab_size, (batch, _PROMPT)).tolist()
        measured: dict[int, list[tuple[float, float]]] = {number: [] for number in range(len(model.mtp) + 1)}
        for _ in range(rounds):
            for number, results in measured.items():
                results.append(decoding_speed(model, prompts, number))
        speeds = {number: statistics.median(speed for speed, _ in of_it) for number, of_it in measured.items()}
        report[batch] = {
            number: {
                "tokens_per_second": speeds[number],
                "acceptance": statistics.median(share for _, share in of_it),
                "ratio": speeds[number] / speeds[0],
            }
            for number, of_it in measured.items()
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="bench")
    parser.add_argument("--model", type=Path, help="a run or a checkpoint instead of the preset")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.8, 1.0], help="shares of drafts that stand")
    parser.add_argument("--drafts", type=int, default=2, help="MTP modules of the preset's model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch's own choice if left out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    reports: dict[str, dict[int, Any]] = {}
    if args.model:
        model, _ = load_model(args.model, dtype=torch.bfloat16)
        reports[str(args.model)] = compare(model, args.batches, args.rounds)
    for share in [] if args.model else args.acceptance:
        config = ModelConfig.preset(args.preset).replace(num_nextn_predict_layers=args.drafts)
        model = model_of_acceptance(config, share).bfloat16()
        pack_weights(model)
        reports[f"{args.preset}, {share:.0%} of the drafts right"] = compare(model, args.batches, args.rounds)
    if args.json:
        print(json.dumps(reports))
        return
    for name, report in reports.items():
        print(name)
        for batch, by_number in report.items():
            for number, found in by_number.items():
                print(
                    f"  batch {batch:2}, {number} drafts: {found['tokens_per_second']:7.1f} tokens/s, "
                    f"{found['acceptance']:4.0%} stand, {found['ratio']:.2f} times"
                )


if __name__ == "__main__":
    main()
