"""What the ranks of `test_trainer.py` run: a run's beginning under one layout, its end under another."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from dsv3.parallel.ranks import Ranks
from dsv3.train.config import TrainConfig
from dsv3.train.execution import Pipelined
from dsv3.train.trainer import Trainer, resume_run, start_run
from tests.parallel.world import mesh_of

STEPS = 12


class Silent:
    def update(self, step, metrics):
        pass

    def log(self, message):
        pass


def settings(out: Path, text: Path, **changes: Any) -> TrainConfig:
    options = {
        "model": "micro",
        "data": str(text),
        "tokens": str(STEPS * 6 * 32),
        "batch_size": "6",
        "micro_batch_size": 2,
        "seq_len": 32,
        "save_every": 4,
        "keep": 9,
        "eval_every": 6,
        "eval_tokens": 512,
        "ema_decay": 0.9,
        "sample_tokens": 3,
        "device": "cpu",
        "dtype": "float32",
        **changes,
    }
    return TrainConfig(out=out, **options)


def whole_run(config: TrainConfig, ranks: Ranks | None = None) -> Trainer:
    trainer = start_run(config, lambda message: None, ranks)
    trainer.fit(Silent())
    return trainer


def run_together(layout: dict[str, int], config: TrainConfig, **trouble: int) -> None:
    """A run from its start to its end. nan_at: the step in which one rank's gradient is not a number."""
    ranks = Ranks(mesh_of(**layout))
    with spoiled(trouble.get("nan_at"), ranks):
        trainer = whole_run(config, ranks)
    if isinstance(trainer.execution, Pipelined):
        trainer.execution.pipeline.close()


@contextlib.contextmanager
def spoiled(step: int | None, ranks: Ranks):
    """The last rank's loss is NaN in one step."""
    if step is None or ranks.mesh.rank != ranks.count - 1:
        yield
        return
    import dsv3.train.step as module

    kept, calls = module.linear_cross_entropy, []

    def spoil(x, weight, labels):
        calls.append(1)
        return kept(x, weight, labels) * (float("nan") if len(calls) == step else 1)

    module.linear_cross_entropy = spoil
    try:
        yield
    finally:
        module.linear_cross_entropy = kept


def resume_together(layout: dict[str, int], run: Path, spread: dict[str, Any] | None = None) -> None:
    trainer = resume_run(run, Ranks(mesh_of(**layout)), spread)
    trainer.fit(Silent())
    if isinstance(trainer.execution, Pipelined):
        trainer.execution.pipeline.close()


def beginning(layout: dict[str, int], config: TrainConfig) -> dict[str, tuple[int, torch.Tensor]]:
    """What this rank has of a new run's weights, each with its first row; nothing is trained.

    Its masters, and what its model has of dense parameters that are whole in it, `name in the model`.
    """
    ranks = Ranks(mesh_of(**layout))
    trainer = start_run(config, lambda message: None, ranks)
    masters = trainer.optimizer.masters()
    held = {name: (trainer.sharding.part(name, rows).begin, rows) for name, rows in masters.items()}
    for name, tensor in trainer.model.state_dict().items():
        shared = name in masters and trainer.sharding.part(name, tensor).shards.size > 1
        if not shared and (name not in masters or ".experts." not in name):
            held[f"{name} in the model"] = 0, tensor
    if isinstance(trainer.execution, Pipelined):
        trainer.execution.pipeline.close()
    return {name: (first, rows.clone()) for name, (first, rows) in held.items()}


def failing_start(layout: dict[str, int], config: TrainConfig) -> str:
    """What every rank is told when the first one finds the data wanting."""
    ranks = Ranks(mesh_of(**layout))
    try:
        start_run(config, lambda message: None, ranks)
    except ValueError as error:
        return str(error)
    return "nothing"
