"""Pipelines over a slow link: DualPipe with overlap against the same without, and against 1F1B.

Two processes form the pipeline. All experts are local, but every dispatch and combine takes a simulated link: what was
sent is there `delay` seconds after it was sent, whoever waits for it sleeps until then, and nobody computes for it. So
communication costs what it does on a cluster (time of a link, not of a core) and can be hidden. The delay is chosen so
that a chunk's transfers take `--ratio` times as long as its computation, which is about 1 in the report.

Three cases: experts of one node, one transfer each way; experts over nodes, where a token takes two hops each way, each
half as long; and a model whose last layer is an MTP module's.

Printed for each method: the measured step, by medians; what the published formula makes of the durations that its own
operations had (all work of a rank, and the bubble); the same schedule simulated with them (`dsv3.plan.pipeline`); and
how much of the links' time was hidden, that is, not slept through, in the whole step and within the pairs of a forward
and a backward pass, which alone can hide any. DualPipe holds two copies of the model. Two minutes or three on two cores
that have nothing else to do; on others the figures mean little.

    python benchmarks/bench_overlap.py
    python benchmarks/bench_overlap.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.model.balance import LoadBalancer
from dsv3.model.experts import DeepSeekMoE, Dispatched, LocalDispatcher
from dsv3.model.router import Routing
from dsv3.model.transformer import Transformer
from dsv3.parallel.expert import CutDispatcher
from dsv3.parallel.layout import balanced_layout
from dsv3.parallel.mesh import Layout, Mesh, connect, disconnect
from dsv3.parallel.pieces import Chunk, Runner
from dsv3.parallel.pipeline import Pipeline
from dsv3.plan.pipeline import Durations, Span, plan_pipeline, simulate
from dsv3.plan.schedules import Op, OverlappedPair, make_schedule
from dsv3.train.pipelined import pipelined_backward_step

RANKS = 2
METHODS = {"1F1B": ("1F1B", False), "DualPipe": ("DualPipe", False), "DualPipe, overlapped": ("DualPipe", True)}
EIGHT = ModelConfig.preset("nano").replace(num_hidden_layers=8, num_nextn_predict_layers=0, first_k_dense_replace=0)
CASES = {  # model, hops of a dispatch or combine
    "experts of one node": (EIGHT, 1),
    "experts over nodes": (EIGHT, 2),
    "seven layers and MTP": (EIGHT.replace(num_hidden_layers=7, num_nextn_predict_layers=1), 1),
}


@dataclass
class Link:
    """Takes `delay` seconds for anything, and knows how long that was in all and how long somebody slept for it."""

    delay: float = 0.0
    busy: float = 0.0
    slept: float = 0.0

    def start(self, x: Tensor) -> Underway:
        self.busy += self.delay
        return Underway(self, x.clone(), time.perf_counter() + self.delay)

    def transposed(self) -> Link:
        return self


@dataclass
class Log:
    """The operations of some steps, and how long the link was busy and slept for in their pairs."""

    link: Link
    spans: list[Span] = field(default_factory=list)
    busy: float = 0.0
    slept: float = 0.0
    before: tuple[float, float] = (0.0, 0.0)

    def add(self, span: Span) -> None:
        self.spans.append(span)
        if isinstance(span.step, OverlappedPair):
            self.busy += self.link.busy - self.before[0]
            self.slept += self.link.slept - self.before[1]
        self.before = self.link.busy, self.link.slept


@dataclass
class Underway:
    link: Link
    x: Tensor
    due: float

    def wait(self) -> None:
        left = self.due - time.perf_counter()
        if left > 0:
            time.sleep(left)
            self.link.slept += left

    def arrived(self) -> Tensor:
        return self.x


class SlowDispatcher(CutDispatcher):
    """`LocalDispatcher` behind `hops` transfers; between two of them rows are handed on."""

    def __init__(self, link: Link, hops: int) -> None:
        self._link, self._hops, self._here = link, hops, LocalDispatcher()

    def dispatch_on(self, runner: Runner, x_TD: Tensor, routing: Routing) -> Chunk[Dispatched]:
        x_TD = yield from self._travel(runner, x_TD)
        return runner.run(self._here.dispatch, x_TD, routing)

    def combine_on(self, runner: Runner, rows_ND: Tensor, dispatched: Dispatched) -> Chunk[Tensor]:
        return (yield from self._travel(runner, runner.run(self._here.combine, rows_ND, dispatched)))

    def _travel(self, runner: Runner, x: Tensor) -> Chunk[Tensor]:
        for hop in range(self._hops):
            if hop:
                x = runner.run(torch.clone, x)
            (x,) = yield from runner.cross((self._link, x))
        return x


class Bench:
    """One case on one rank."""

    def __init__(self, mesh: Mesh, config: ModelConfig, hops: int, args: argparse.Namespace) -> None:
        self.mesh, self.args, self.link = mesh, args, Link()
        random = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(config.vocab_size, (args.chunks, args.seq_len + 1), generator=random)
        self.mtp_weight = 0.3 if config.num_nextn_predict_layers else 0.0
        self.transfers = 4 * hops * config.num_layers_with_mtp / RANKS  # of a chunk on a rank, there and back
        self.pipelines = {}
        for name, (method, overlap) in METHODS.items():
            torch.manual_seed(0)
            model = Transformer(config)
            for module in model.modules():
                if isinstance(module, DeepSeekMoE):
                    module.dispatcher = SlowDispatcher(self.link, hops)
            parts = balanced_layout(config, RANKS, context=args.seq_len)
            self.pipelines[name] = Pipeline(model, parts, mesh, schedule=method, overlap=overlap)

    def step(self, name: str, log: Log, chunks: int) -> float:
        """Seconds from when all ranks begin."""
        pipeline = self.pipelines[name]
        self.link.busy = self.link.slept = 0.0
        log.before = 0.0, 0.0
        pipeline.model.zero_grad()
        self.mesh.host.sum_(torch.zeros(1))
        started = time.perf_counter()
        pipelined_backward_step(
            pipeline,
            LoadBalancer(pipeline.model),
            self.tokens[:chunks],
            micro_batch_size=1,
            mtp_weight=self.mtp_weight,
            eos_token_id=None,
            record=log.add,
        )
        return time.perf_counter() - started

    def run(self) -> dict[str, Any]:
        """This rank's times and durations by method."""
        for name in METHODS:
            self.step(name, Log(self.link), 2 * RANKS)  # warm-up
        calm = Log(self.link)
        self.step("1F1B", calm, self.args.chunks)
        mean = durations_of(calm.spans)
        computing = torch.tensor((mean["F"] + mean["B"]) / self.transfers / RANKS)
        self.link.delay = float(self.mesh.host.sum_(computing)) * self.args.ratio
        logs = {name: Log(self.link) for name in METHODS}
        seconds, hidden = (defaultdict[str, list[float]](list) for _ in range(2))
        for _ in range(self.args.rounds):
            for name in METHODS:
                seconds[name].append(self.step(name, logs[name], self.args.chunks))
                hidden[name].append(1 - self.link.slept / self.link.busy)
        for pipeline in self.pipelines.values():
            pipeline.close()
        methods = {
            name: {
                "seconds": statistics.median(seconds[name]),
                "hidden": statistics.median(hidden[name]),
                "hidden in pairs": 1 - log.slept / log.busy if log.busy else 0.0,
                "durations": mean | durations_of(log.spans),
            }
            for name, log in logs.items()
        }
        return {"delay": self.link.delay, "methods": methods}


def durations_of(spans: list[Span]) -> dict[str, float]:
    """The mean time of each kind of operation there is."""
    seconds = defaultdict(list)
    for span in spans:
        seconds[span.step.kind if isinstance(span.step, Op) else "F&B"].append(span.end - span.start)
    return {kind: statistics.fmean(times) for kind, times in seconds.items()}


def worker(rank: int, port: int, args: argparse.Namespace, answers: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    mesh = connect(Layout(pp=RANKS), torch.device("cpu"))
    answers.put({case: Bench(mesh, config, hops, args).run() for case, (config, hops) in CASES.items()})
    disconnect()


def compared(case: list[dict[str, Any]], chunks: int) -> dict[str, Any]:
    """What the ranks measured, beside what the planner makes of their mean durations."""
    report = {}
    for name, (method, _) in METHODS.items():
        rows = [rank["methods"][name] for rank in case]
        times = {kind: statistics.fmean(row["durations"][kind] for row in rows) for kind in rows[0]["durations"]}
        schedule, durations = make_schedule(method, RANKS, chunks), Durations.from_mapping(times)
        plan = plan_pipeline(RANKS, chunks, durations=durations, methods=[method])["methods"][0]
        report[name] = {
            "seconds": max(row["seconds"] for row in rows),
            "formula": max(sum(map(durations.of, steps)) for steps in schedule.ranks) + plan["bubble_formula"],
            "simulated": simulate(schedule, durations).makespan,
            **{kind: statistics.fmean(row[kind] for row in rows) for kind in ("hidden", "hidden in pairs")},
            "durations": times,
        }
    overlapped = report["DualPipe, overlapped"]["seconds"]
    return {
        "delay": case[0]["delay"],
        "methods": report,
        "1F1B to overlapped": report["1F1B"]["seconds"] / overlapped,
        "ratio": report["DualPipe"]["seconds"] / overlapped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=14, help="micro-batches of one sequence")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=1.0, help="a chunk's transfers to its computation")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    port = 29500 + os.getpid() % 10000
    processes = [context.Process(target=worker, args=(rank, port, args, answers)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    ranks = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    result = {case: compared([rank[case] for rank in ranks], args.chunks) for case in CASES}
    if args.json:
        print(json.dumps(result))
        return
    for case, found in result.items():
        print(f"{case}: every transfer takes {found['delay'] * 1000:.1f} ms")
        for name, row in found["methods"].items():
            print(
                f"  {name:22} step {row['seconds']:6.3f} s   by formula {row['formula']:6.3f} s   "
                f"simulated {row['simulated']:6.3f} s   hidden {row['hidden']:4.0%}, "
                f"in pairs {row['hidden in pairs']:4.0%}"
            )
    for case, found in result.items():
        print(
            f"{case}: 1F1B / DualPipe overlapped {found['1F1B to overlapped']:.2f}, "
            f"ratio DualPipe / DualPipe overlapped {found['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
