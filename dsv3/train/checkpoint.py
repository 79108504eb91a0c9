"""A run's checkpoint: a Hugging Face folder (FP32 master weights, tokenizer) plus what resuming needs.

Any tool that reads DeepSeek-V3 checkpoints reads it; `optimizer.safetensors`, `ema.safetensors` and `trainer.json`
mean nothing to them. The data's order and every schedule are functions of the step, and training draws no random
numbers, so weights, moments, biases and the step are all the state there is; what else a run keeps (its guard's
memory of losses) goes into trainer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.checkpoint.encoding import write_model
from dsv3.checkpoint.pretrained import load_pretrained
from dsv3.checkpoint.source import Stored
from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.train.ema import Ema
from dsv3.train.optim import MasterOptimizer
from dsv3.train.run import read_json, write_json
from dsv3.train.snapshot import Snapshot

_OPTIMIZER, _EMA, _TRAINER = "optimizer.safetensors", "ema.safetensors", "trainer.json"


def write_snapshot(folder: Path, snapshot: Snapshot, tokenizer: Path) -> None:
    """Fill an empty folder. tokenizer: the folder whose files go with it."""
    write_model(
        folder,
        snapshot.config,
        read=lambda tensor, rows: Stored(tensor.view(snapshot.weights)[rows]),
        stored_dtype=lambda tensor: snapshot.weights[tensor.param].dtype,
        dtype=torch.float32,
        fp8=False,
        copy_files=sorted(tokenizer.iterdir()),
    )
    _save(folder / _OPTIMIZER, snapshot.optimizer)
    if snapshot.ema is not None:
        _save(folder / _EMA, snapshot.ema)
    write_json(folder / _TRAINER, {"step": snapshot.step, "extra": snapshot.extra})


def read_checkpoint(folder: Path, model: Transformer, optimizer: MasterOptimizer, ema: Ema | None = None) -> int:
    """Load what `write_snapshot` wrote into model, optimizer and EMA; returns the optimizer steps done.

    Raises `UserError` if a file is missing or broken, or if the checkpoint is of another shape.
    """
    step = read_json(folder / _TRAINER).get("step")
    if not isinstance(step, int):
        raise UserError(f"{folder / _TRAINER} has no step: the checkpoint is broken, remove it to use an older one")
    saved = load_pretrained(folder, dtype=torch.float32)
    if saved.config != model.config:
        raise UserError(f"the checkpoint {folder} is of another model than the run's config.json says")
    moments = _load(folder / _OPTIMIZER)
    averages = None if ema is None else _load(folder / _EMA)
    optimizer.load_state(moments)
    if ema is not None and averages is not None:
        ema.load_state(averages)
    model.load_state_dict(saved.state_dict())
    optimizer.load_masters(saved.state_dict())
    return step


def read_extra(folder: Path) -> dict[str, Any]:
    """The `extra` of the snapshot in a checkpoint; empty if it has none."""
    extra = read_json(folder / _TRAINER).get("extra", {})
    if not isinstance(extra, dict):
        raise UserError(f"{folder / _TRAINER} is broken: remove {folder} to use an older checkpoint")
    return extra


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file(dict(tensors), file)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file} ({error}): remove {file.parent} to use an older checkpoint") from None
