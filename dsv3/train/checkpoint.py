"""A run's checkpoint: a Hugging Face folder (FP32 master weights, tokenizer) plus what resuming needs.

Any tool that reads DeepSeek-V3 checkpoints reads it; `optimizer.safetensors` and `trainer.json` mean nothing to
them. The data's order and every schedule are functions of the step, and training draws no random numbers, so
weights, moments, biases and the step are all the state there is.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dsv3.checkpoint.pretrained import load_pretrained, save_pretrained
from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.train.optim import MasterAdamW
from dsv3.train.run import read_json, write_json


def write_checkpoint(folder: Path, model: Transformer, optimizer: MasterAdamW, step: int, tokenizer: Path) -> None:
    """Fill an empty folder. `step`: optimizer steps done."""
    shadow = _shadow(model.config, {**model.state_dict(), **optimizer.masters()})
    save_pretrained(shadow, folder, dtype=torch.float32)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    try:
        save_file(optimizer.state(), folder / "optimizer.safetensors")
    except SafetensorError as error:
        raise OSError(str(error)) from error
    write_json(folder / "trainer.json", {"step": step})


def read_checkpoint(folder: Path, model: Transformer, optimizer: MasterAdamW) -> int:
    """Load what `write_checkpoint` wrote into model and optimizer; returns the optimizer steps done.

    Raises `UserError` if a file is missing or broken, or if the checkpoint is of another shape.
    """
    step = read_json(folder / "trainer.json").get("step")
    if not isinstance(step, int):
        raise UserError(
            f"{folder / 'trainer.json'} has no step: the checkpoint is broken, remove it to use an older one"
        )
    saved = load_pretrained(folder, dtype=torch.float32)
    if saved.config != model.config:
        raise UserError(f"the checkpoint {folder} is of another model than the run's config.json says")
    try:
        moments = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {folder / 'optimizer.safetensors'} ({error}): remove {folder} to use an older one"
        ) from None
    model.load_state_dict(saved.state_dict())
    optimizer.load_masters(saved.state_dict())
    optimizer.load_state(moments)
    return step


def _shadow(config: ModelConfig, state: dict[str, torch.Tensor]) -> Transformer:
    """A model that holds the given tensors themselves, not copies."""
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(state, assign=True)
    return model
