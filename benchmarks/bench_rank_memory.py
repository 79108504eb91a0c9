"""Memory of each process of a training run, under one layout after the other.

A run of a model of 200 million parameters is begun by two or four processes and takes two steps. Printed of
each layout: the largest process's model and masters, and the most memory (resident, of Linux) that it had above what it
had before, once until the first step and once in the steps: what a layout saves beside what gathering costs it. Memory
is handed back as soon as it is freed, so that the peak is what was in use. FP32 unless said otherwise; each pipeline
has micro-batches of one sequence. Seven GiB and some minutes.

    python benchmarks/bench_rank_memory.py
    python benchmarks/bench_rank_memory.py --json     # one JSON object
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch.distributed.tensor import DTensor

from dsv3.checkpoint.hf_config import config_to_hf, save_config
from dsv3.config import ModelConfig
from dsv3.parallel.ranks import Ranks
from dsv3.train.config import TrainConfig
from dsv3.train.launch import joined
from dsv3.train.trainer import start_run

MODEL = ModelConfig.preset("nano").replace(
    vocab_size=8192,
    hidden_size=768,
    intermediate_size=1536,
    moe_intermediate_size=384,
    num_hidden_layers=12,
    n_routed_experts=16,
    max_position_embeddings=64,
)
ONE, DUAL = {"pp": 2, "schedule": "1F1B"}, {"pp": 2, "schedule": "DualPipe"}
CASES: list[tuple[int, dict[str, Any]]] = [  # processes, settings
    (2, {"dp_replicate": 2}),
    (2, {"ep": 2}),
    (2, {"ep": 2, "dtype": "bfloat16"}),
    (2, {"dp_shard": 2}),
    (2, ONE),
    (4, {"dp_replicate": 4}),
    (4, {"dp_shard": 4}),
    (4, {**ONE, "dp_replicate": 2}),
    (4, {**ONE, "dp_shard": 2}),
    (4, {**ONE, "dp_replicate": 2, "dtype": "bfloat16"}),
    (4, {**ONE, "dp_shard": 2, "dtype": "bfloat16"}),
    (4, {**DUAL, "dp_replicate": 2}),
    (4, {**DUAL, "dp_shard": 2}),
    (4, {**DUAL, "dp_replicate": 2, "ep": 2, "overlap": True}),
    (4, {**DUAL, "dp_shard": 2, "ep": 2, "overlap": True}),
]
COLUMNS = ("model", "masters", "beginning", "steps")
STEPS, GIB = 2, 2**30


class Peak:
    """Bytes that this process has come to, at its worst, above what it had when this was made."""

    def __init__(self) -> None:
        self._before = _status("VmRSS")
        self.forget()

    def forget(self) -> None:
        """The worst begins anew."""
        Path("/proc/self/clear_refs").write_text("5")

    def __call__(self) -> int:
        return _status("VmHWM") - self._before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measured(config: TrainConfig, ranks: Ranks) -> dict[str, int]:
    """Bytes of this process."""
    peak = Peak()
    trainer = start_run(config, lambda message: None, ranks)
    found = {
        "model": sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in trainer.model.parameters()),
        "masters": sum(master.nbytes for master in trainer.optimizer.masters().values()),
        "beginning": peak(),
    }
    peak.forget()
    for _ in range(STEPS):
        trainer.train_step()
    return {**found, "steps": peak()}


def worker(rank: int, processes: int, port: int, options: dict[str, Any], answers: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    config = TrainConfig(**options)
    with joined(config) as ranks:
        (answers / f"{rank}.json").write_text(json.dumps(measured(config, ranks)))


def run(processes: int, settings: dict[str, Any]) -> dict[str, int]:
    """The most that any process has, by column."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").mkdir()
        save_config(folder / "model", config_to_hf(MODEL, dtype=torch.float32))
        numbers = random.Random(0)
        (folder / "text.txt").write_text("\n".join(f"{i} is {numbers.random()}" for i in range(4000)))
        options = {
            "out": folder / "run",
            "model": str(folder / "model"),
            "data": str(folder / "text.txt"),
            "seq_len": 32,
            "tokens": str(8 * 32 * STEPS),
            "batch_size": "8",
            "micro_batch_size": 1,
            "device": "cpu",
            "dtype": "float32",
            **settings,
        }
        multiprocessing.spawn(worker, (processes, _free_port(), options, folder), nprocs=processes)
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return {column: max(rank[column] for rank in ranks) for column in COLUMNS}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # for the processes to come: what is freed is given back
    rows = []
    for processes, settings in CASES:
        row = run(processes, settings)
        rows.append({"processes": processes, **settings, **row})
        if not args.json:
            text = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
            figures = ", ".join(f"{column} {row[column] / GIB:5.2f}" for column in COLUMNS)
            print(f"{processes} processes, {text:66} {figures} GiB", flush=True)
    if args.json:
        print(json.dumps({"cases": rows}))


if __name__ == "__main__":
    main()
