"""Speed of the engine against llama.cpp, vLLM and transformers on a CPU: prompts, and decoding at batch 1, 8 and 32.

All hold the same random weights (preset bench-576, BF16; at batch 1 also 8 bits, ours and llama.cpp's Q8_0), get the
same prompts of 512 tokens and generate greedily, past the end token. Each engine is a process of its own with the same
number of threads, and in an environment of its own, made from PyPI at the first run (`peers/environments.py`); its
settings stand in `peers/run_*.py`. They take turns, and the ratios printed last are of medians over the rounds. No
engine drafts, none remembers prefixes. An engine that cannot be installed or started is left out with one line.

A prompt's rate is that of a run that generates one token. Decoding is measured while all sequences decode: from when
the last of them has its first token to when the first has its last. "ceiling" is what batch 1 could reach if reading
the active weights once, at the rate this machine reads memory, were all there is to do. At last it says how many of the
peers' first tokens and texts are ours: most and some of them, since engines round differently and BF16 is coarse.

vLLM's package wants torch's build for CPUs, which PyPI does not have. Where pip is not set up to find it, say
TORCH_INDEX=https://download.pytorch.org/whl/cpu before the first run.

    python benchmarks/bench_peers.py
    python benchmarks/bench_peers.py --peers llamacpp --batches 1 --rounds 1
    python benchmarks/bench_peers.py --json           # one JSON object
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers.environments import ENVS, OURS, PEERS, install
from peers.process import Engine
from peers.protocol import Setup

from dsv3.checkpoint.pretrained import save_pretrained
from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.model.transformer import Transformer

# Which engines have weights of 8 bits too: llama.cpp's are Q8_0.
INT8 = (OURS, "llamacpp")
PREFILL_STEP = 2048  # prompt tokens that go into one step at most, in every engine that mixes prompts with decoding
MAX_PREFILL_BATCH = 8  # rates of prompts change little beyond, and 32 prompts take long


@dataclass
class Task:
    """One row of the table."""

    what: str  # "prefill" or "decode"
    batch: int
    weights: str  # "bf16" or "int8"
    prompts: list[list[int]]
    rates: dict[str, list[float]] = field(default_factory=dict)  # tokens/s by engine, one for each round
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)  # what was generated, by engine

    def warm_up(self, engine: Engine) -> None:
        """Everything once; before decoding a short prompt will do."""
        prefill = self.what == "prefill"
        engine.generate(self.prompts if prefill else [prompt[:32] for prompt in self.prompts], 1 if prefill else 4)

    def measure(self, engine: Engine, new: int) -> None:
        """One round."""
        answer = engine.generate(self.prompts, 1 if self.what == "prefill" else new)
        seconds = answer["seconds"]
        rate = prefill_rate(seconds, len(self.prompts[0])) if self.what == "prefill" else decode_rate(seconds)
        self.rates.setdefault(engine.peer, []).append(rate)
        self.tokens[engine.peer] = answer["tokens"]

    def report(self) -> dict[str, Any]:
        """As plain values: medians, and the ratios of ours to each peer's and to the best one's."""
        rates = {engine: statistics.median(of) for engine, of in self.rates.items()}
        ours = rates.get(OURS, 0.0)
        ratios = {engine: ours / rate for engine, rate in rates.items() if engine != OURS}
        return {
            "what": f"{self.what} at batch {self.batch}" + (", 8 bits" if self.weights == "int8" else ""),
            "tokens_per_second": rates,
            "ratios": ratios,
            "ratio_to_best": min(ratios.values(), default=None),
            "rounds": self.rates,
        }


def prefill_rate(seconds: list[list[float]], length: int) -> float:
    """Prompt tokens a second, until the last prompt's first token."""
    return len(seconds) * length / max(of_sequence[0] for of_sequence in seconds)


def decode_rate(seconds: list[list[float]]) -> float:
    """Tokens a second while all sequences decode; each sequence's own rate in that time, summed."""
    begin, end = max(of[0] for of in seconds), min(of[-1] for of in seconds)
    rate = 0.0
    for of_sequence in seconds:
        within = [second for second in of_sequence if begin <= second <= end]
        if len(within) < 5:
            raise UserError("the sequences hardly decode at the same time: give a larger --new")
        rate += (len(within) - 1) / (within[-1] - within[0])
    return rate


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is shown, as plain values."""
    config = ModelConfig.preset(args.preset).replace(num_nextn_predict_layers=0)
    model = args.envs / args.preset  # the same path every time: vLLM finds again what it compiled
    save_pretrained(random_model(config).bfloat16(), model, overwrite=True)
    tasks = make_tasks(args, config.vocab_size)
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as logs, ExitStack() as processes:
        engines = start(args, model, Path(logs), processes, left_out)
        for number in range(-1, args.rounds):
            for task in tasks:
                for engine in [engine for engine in engines if engine.setup.weights == task.weights]:
                    try:
                        task.warm_up(engine) if number < 0 else task.measure(engine, args.new)
                    except UserError as error:
                        if engine.peer == OURS:
                            raise
                        left_out[engine.peer] = str(error)
                        engines.remove(engine)
    rate = read_rate()
    return {
        "preset": args.preset,
        "prompt": args.prompt,
        "threads": args.threads,
        "engines": [engine.description for engine in engines],
        "left_out": left_out,
        "rows": [task.report() for task in tasks],
        "same_tokens": {peer: same_tokens(tasks, peer) for peer in args.peers if peer not in left_out},
        "read_gbs": rate / 1e9,
        "ceiling": rate / active_bytes(config),
    }


@torch.no_grad()
def random_model(config: ModelConfig) -> Transformer:
    """Weights that keep the variance from layer to layer.

    Those that training starts from are so small that a token hardly depends on those before it: every text would
    repeat one token, read the same few experts, and hide whatever an engine gets wrong in attention.
    """
    torch.manual_seed(0)
    model = Transformer(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(std=1.0 if name == "embed_tokens.weight" else weight.shape[-1] ** -0.5)
    return model


def make_tasks(args: argparse.Namespace, vocabulary: int) -> list[Task]:
    """What is measured, with the prompts, which are the same in every round and for every engine."""

    def prompts(batch: int) -> list[list[int]]:
        return torch.randint(2, vocabulary, (batch, args.prompt)).tolist()

    tasks = []
    for batch in args.batches:
        if batch <= MAX_PREFILL_BATCH:
            tasks.append(Task("prefill", batch, "bf16", prompts(batch)))
        tasks.append(Task("decode", batch, "bf16", prompts(batch)))
    if 1 in args.batches:
        tasks += [Task(what, 1, "int8", prompts(1)) for what in ("prefill", "decode")]
    return tasks


def start(
    args: argparse.Namespace, model: Path, logs: Path, processes: ExitStack, left_out: dict[str, str]
) -> list[Engine]:
    """Every engine's process, ready, one after the other; those that cannot be go to `left_out`, with the reason."""
    engines = []
    for peer in (OURS, *args.peers):
        for weights in ("bf16", "int8") if peer in INT8 and 1 in args.batches else ("bf16",):
            setup = Setup(str(model), weights, args.threads, max(args.batches), args.prompt + args.new, PREFILL_STEP)
            try:
                python = Path(sys.executable) if peer == OURS else install(peer, args.envs)
                engine = Engine(peer, python, setup, logs / f"{peer}-{weights}.txt")
            except UserError as error:
                left_out[peer] = str(error)
                break
            processes.callback(engine.close)
            engines.append(engine)
    return engines


def same_tokens(tasks: list[Task], peer: str) -> dict[str, float]:
    """Shares of the BF16 sequences whose first token, and whose tokens all, are those that our engine gave."""
    ours = [tokens for task in tasks if task.weights == "bf16" for tokens in task.tokens[OURS]]
    theirs = [tokens for task in tasks if task.weights == "bf16" for tokens in task.tokens[peer]]
    both = list(zip(ours, theirs, strict=True))
    return {
        "first": statistics.mean(a[0] == b[0] for a, b in both),
        "all": statistics.mean(a == b for a, b in both),
    }


def read_rate() -> float:
    """Bytes per second that this machine reads from memory, with all threads."""
    data = torch.ones(1 << 27, dtype=torch.int16)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        data.max()
        times.append(time.perf_counter() - start)
    return data.nbytes / statistics.median(times)


def active_bytes(config: ModelConfig) -> float:
    """Bytes of BF16 weights that one token's forward pass reads, head included, embedding not."""
    with torch.device("meta"):
        model = Transformer(config)
    total = 0.0
    for name, parameter in model.named_parameters():
        share = config.num_experts_per_tok / config.n_routed_experts if ".experts." in name else 1.0
        total += 0 if name.startswith("embed_tokens") else 2 * share * parameter.numel()
    return total


def show(report: dict[str, Any]) -> None:
    """The table: tokens a second, then our rate over each peer's and over the best peer's."""
    peers = list(report["same_tokens"])
    print(f"{'tokens/s':28}" + "".join(f"{name:>14}" for name in (OURS, *peers)))
    for row in report["rows"]:
        print(f"{row['what']:28}" + _cells(row["tokens_per_second"], [OURS, *peers], 1))
    if peers:
        print(f"\n{'ours over theirs':28}{'best':>14}" + "".join(f"{name:>14}" for name in peers))
    for row in report["rows"] if peers else ():
        print(f"{row['what']:28}" + _cells(row["ratios"] | {"best": row["ratio_to_best"]}, ["best", *peers], 2))
    for peer, same in report["same_tokens"].items():
        print(f"{peer}: {same['first']:.0%} of the first tokens and {same['all']:.0%} of the sequences are ours")
    for peer, reason in report["left_out"].items():
        print(f"{peer} is left out: {reason}")
    rate, ceiling = report["read_gbs"], report["ceiling"]
    print(f"memory is read at {rate:.0f} GB/s: the ceiling at batch 1 in BF16 is {ceiling:.0f} tokens/s")


def _cells(values: dict[str, float | None], names: list[str], digits: int) -> str:
    return "".join(f"{values[name]:14.{digits}f}" if values.get(name) else f"{'':14}" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32, help="tokens of each sequence where decoding is measured")
    parser.add_argument("--preset", default="bench-576")
    parser.add_argument("--envs", type=Path, default=ENVS, help="where the peers' environments and the model are kept")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = measure(args)
    print(json.dumps(report)) if args.json else show(report)


if __name__ == "__main__":
    main()
