"""A model and its tokenizer from a checkpoint folder or a run, ready to generate."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3.checkpoint.locate import find_checkpoint
from dsv3.checkpoint.pretrained import load_pretrained
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.transformer import Transformer


def load_model(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, Tokenizer]:
    """The model in `path` (a checkpoint, or a run's newest), in evaluation mode, and the tokenizer beside it."""
    folder = find_checkpoint(path)
    tokenizer = Tokenizer.load(folder)
    return load_pretrained(folder, dtype=dtype, device=device), tokenizer
