"""A run's checkpoint: a Hugging Face folder (FP32 master weights, tokenizer) plus what resuming needs.

Any tool that reads DeepSeek-V3 checkpoints reads it; `optimizer.safetensors`, `ema.safetensors` and `trainer.json`
mean nothing to them. The data's order and every schedule are functions of the step, and training draws no random
numbers, so weights, moments, biases and the step are all the state there is; what else a run keeps (its guard's
memory of losses) goes into trainer.json.

Several processes write one such folder together, each the rows that it holds, and each reads the rows that it needs:
a run goes on under any other layout, and its checkpoints are used as if one process had written them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3.checkpoint.hf_config import config_to_hf
from dsv3.checkpoint.names import canonical_tensors
from dsv3.checkpoint.parts import create_file, fill_file, held_pieces, read_parts
from dsv3.checkpoint.source import Checkpoint
from dsv3.checkpoint.writer import MAX_SHARD_BYTES, TensorEntry, check_space, shard_files, write_companions
from dsv3.errors import UserError
from dsv3.files import refusals
from dsv3.model.transformer import Transformer
from dsv3.parallel.ranks import Ranks
from dsv3.parallel.shard import Sharding
from dsv3.parallel.stages import RankModel
from dsv3.train.ema import Ema
from dsv3.train.optim import MasterOptimizer
from dsv3.train.run import read_json, write_json
from dsv3.train.snapshot import Snapshot

_OPTIMIZER, _EMA, _TRAINER = "optimizer.safetensors", "ema.safetensors", "trainer.json"


def write_snapshot(folder: Path, snapshot: Snapshot, tokenizer: Path, ranks: Ranks | None = None) -> None:
    """Fill an empty folder. tokenizer: the folder whose files go with it.

    ranks: processes that call this together, each with a snapshot of its part, once the folder is there.
    """
    ranks = Ranks() if ranks is None else ranks
    sharding, written = snapshot.sharding, snapshot.sharding.written(snapshot.weights)
    entries = [TensorEntry(tensor.name, tensor.shape, torch.float32) for tensor in canonical_tensors(snapshot.config)]
    values = {_OPTIMIZER: {name: (_parameter_of(name), value) for name, value in snapshot.optimizer.items()}}
    if snapshot.ema is not None:
        values[_EMA] = {name: (name, value) for name, value in snapshot.ema.items()}
    shards = shard_files(entries, MAX_SHARD_BYTES)
    files = {**shards, **{file: _all_entries(held, sharding, ranks) for file, held in values.items()}}

    def create() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, sum(entry.nbytes for file in files.values() for entry in file))
        for file, contents in files.items():
            create_file(folder / file, contents)
        write_companions(
            folder,
            entries,
            config_to_hf(snapshot.config, dtype=torch.float32),
            MAX_SHARD_BYTES,
            sorted(tokenizer.iterdir()),
        )
        write_json(folder / _TRAINER, {"step": snapshot.step, "extra": snapshot.extra})

    def fill() -> None:
        pieces = list(held_pieces(snapshot.config, written))
        for file, contents in shards.items():
            names = {entry.name for entry in contents}
            here = (piece for piece in pieces if piece.tensor.name in names)
            rows = ((p.tensor.name, p.rows.start, snapshot.weights[p.tensor.param][p.index]) for p in here)
            fill_file(folder / file, contents, rows)
        for file, held in values.items():
            fill_file(folder / file, files[file], _own_rows(held, sharding, ranks))

    for action, do in ((create, ranks.first_alone), (fill, ranks.together)):
        do(functools.partial(_refusing, folder, action))


def _parameter_of(state: str) -> str:
    """`KIND.NAME` of an optimizer's state belongs to the parameter NAME."""
    return state.split(".", 1)[-1]


def _refusing(folder: Path, action: Callable[[], None]) -> None:
    with refusals(folder):
        action()


def _all_entries(held: Mapping[str, tuple[str, Tensor]], sharding: Sharding, ranks: Ranks) -> list[TensorEntry]:
    """What a file will hold of all processes' tensors; `held` has this one's, each with its parameter's name."""
    mine = {
        name: [_whole_shape(parameter, value, sharding), str(value.dtype).removeprefix("torch.")]
        for name, (parameter, value) in held.items()
    }
    everything: dict[str, Any] = {}
    for text in ranks.gather_texts(json.dumps(mine)):
        everything.update(json.loads(text))
    return [TensorEntry(name, tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in everything.items()]


def _whole_shape(parameter: str, value: Tensor, sharding: Sharding) -> tuple[int, ...]:
    return sharding.part(parameter, value).shape if value.dim() else ()


def _own_rows(
    held: Mapping[str, tuple[str, Tensor]], sharding: Sharding, ranks: Ranks
) -> Iterator[tuple[str, int, Tensor]]:
    for name, (parameter, value) in held.items():
        if not value.dim():
            part = sharding.known(parameter)
            if ranks.is_first if part is None else part.first and part.begin == 0:
                yield name, 0, value
        elif rows := sharding.written({parameter: value}).get(parameter):
            yield name, rows.start, value


def read_checkpoint(
    folder: Path, model: Transformer | RankModel, optimizer: MasterOptimizer, ema: Ema | None = None
) -> int:
    """Load what `write_snapshot` wrote, under whatever layout, into model, optimizer and EMA; returns the steps done.

    Each process reads the rows it holds. Raises `UserError` if a file is missing or broken, or if the checkpoint is of
    another shape.
    """
    step = read_json(folder / _TRAINER).get("step")
    if not isinstance(step, int):
        raise UserError(f"{folder / _TRAINER} has no step: the checkpoint is broken, remove it to use an older one")
    saved = Checkpoint(folder)
    if saved.config != model.config:
        raise UserError(f"the checkpoint {folder} is of another model than the run's config.json says")
    sharding = optimizer.sharding
    moments = _load(folder / _OPTIMIZER, sharding, _parameter_of)
    averages = None if ema is None else _load(folder / _EMA, sharding, lambda name: name)
    held = {**dict(model.named_buffers()), **optimizer.masters()}
    weights = {name: torch.empty_like(value, device="cpu") for name, value in held.items()}
    read_parts(saved, model.config, {name: (rows, sharding.part(name, rows).begin) for name, rows in weights.items()})
    optimizer.load_state(moments)
    if ema is not None and averages is not None:
        ema.load_state(averages)
    for name, buffer in model.named_buffers():
        buffer.copy_(weights[name])
    optimizer.load_masters(weights)
    return step


def read_extra(folder: Path) -> dict[str, Any]:
    """The `extra` of the snapshot in a checkpoint; empty if it has none."""
    extra = read_json(folder / _TRAINER).get("extra", {})
    if not isinstance(extra, dict):
        raise UserError(f"{folder / _TRAINER} is broken: remove {folder} to use an older checkpoint")
    return extra


def _load(file: Path, sharding: Sharding, parameter_of: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors of a file, of each the rows that this process holds of its parameter."""
    out = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                if sharding.is_elsewhere(parameter_of(name)):
                    continue
                rows = tensors.get_slice(name)
                part = sharding.known(parameter_of(name))
                # Of another shape it is of another model: whoever takes the state says so.
                if part is None or tuple(rows.get_shape()) != part.shape:
                    out[name] = tensors.get_tensor(name)
                else:
                    out[name] = rows[part.begin : part.end]
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file} ({error}): remove {file.parent} to use an older checkpoint") from None
    return out
