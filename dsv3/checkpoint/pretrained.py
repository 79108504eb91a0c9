"""A `Transformer` from a checkpoint folder and back, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3.checkpoint.encoding import check_dtype, write_model
from dsv3.checkpoint.names import canonical_tensors
from dsv3.checkpoint.parts import read_parts
from dsv3.checkpoint.source import Checkpoint, Stored
from dsv3.checkpoint.writer import MAX_SHARD_BYTES
from dsv3.config import ModelConfig
from dsv3.model.transformer import Transformer


def load_pretrained(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    config: ModelConfig | None = None,
) -> Transformer:
    """The model in the folder `path` (official DeepSeek-V3 format), in evaluation mode.

    dtype: of the weights; None takes that of the files (of the embedding, which is never FP8). The router's weight
    and bias are FP32 whatever it is. config: the model's in place of the folder's, with the same tensors (another
    `rope_scaling`, say). Needs the model's size on `device`, and on the CPU that of its largest tensor. Raises
    `UserError` on a missing, unexpected or misshapen tensor, a damaged file or a config that is not understood.
    """
    check_dtype(dtype)
    checkpoint = Checkpoint(path)
    config = config or checkpoint.config
    checkpoint.check_fits(config)
    dtype = checkpoint.dtype if dtype is None else dtype
    with torch.device("meta"):
        model = Transformer(config)
    state = {name: torch.empty_like(meta, dtype=dtype, device=device) for name, meta in model.state_dict().items()}
    for tensor in canonical_tensors(config):
        if tensor.kind in ("router", "bias"):
            state[tensor.param] = state[tensor.param].to(torch.promote_types(dtype, torch.float32))
    read_parts(checkpoint, config, {name: (tensor, 0) for name, tensor in state.items()})
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_pretrained(
    model: Transformer,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` to the folder `path` in the official DeepSeek-V3 format, whole or not at all.

    dtype: of the tensors (the routing bias is FP32 always); None keeps each one's own. fp8: Linear weights, except
    the router, the head and MTP's `eh_proj`, as E4M3 in 128x128 blocks. overwrite: replace a checkpoint folder at
    `path`, with everything in it. Raises `UserError` if `path` is in the way or cannot be written.
    """
    state = model.state_dict()
    write_model(
        path,
        model.config,
        read=lambda tensor, rows: Stored(tensor.view(state)[rows]),
        stored_dtype=lambda tensor: state[tensor.param].dtype,
        dtype=dtype,
        fp8=fp8,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
    )
