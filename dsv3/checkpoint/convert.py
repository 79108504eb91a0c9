"""Folder to folder: another dtype, FP8 blocks in or out, other shards. No model is built, no tensor held whole."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3.checkpoint.encoding import write_model
from dsv3.checkpoint.source import Checkpoint
from dsv3.checkpoint.writer import MAX_SHARD_BYTES, Progress

# What belongs to a model beside its weights. Code that travels with a checkpoint is left behind.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Rewrite the checkpoint folder `source` as `target`, tokenizer files included.

    dtype: of what is not FP8; None keeps each tensor's own, and BF16 for FP8 that is unpacked. fp8: Linear weights as
    E4M3 blocks; what is so already keeps its bits. The routing bias is FP32 always. progress: called with the bytes
    written and the bytes in all. Memory: a few hundred MB, however large the model or a tensor of it.
    Raises `UserError` as `load_pretrained` and `save_pretrained` do; the target is then as it was.
    """
    checkpoint = Checkpoint(source)
    write_model(
        target,
        checkpoint.config,
        read=checkpoint.read,
        stored_dtype=checkpoint.stored_dtype,
        dtype=dtype,
        fp8=fp8,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        copy_files=[file for name in COMPANIONS if (file := Path(source) / name).is_file()],
        progress=progress,
    )
