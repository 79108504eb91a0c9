"""Bits per byte on held-out text: comparable between tokenizers, where a loss per token is not."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dsv3.data.batches import held_out_windows
from dsv3.data.prepared import PreparedSource
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import IGNORE, linear_cross_entropy
from dsv3.train.step import labels_at


@torch.no_grad()
def bits_per_byte(
    model: Transformer,
    source: PreparedSource,
    token_bytes_V: np.ndarray,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int,
    eos_token_id: int | None,
) -> float:
    """-sum log2 p(token) / bytes of those tokens, over about the first `max_tokens` held-out tokens of `source`.

    token_bytes_V: bytes of UTF-8 text behind each id (0 for special tokens, whose loss still counts). Targets in
    another document than their input are left out, as in training.
    """
    device = model.lm_head.weight.device
    bytes_V = torch.as_tensor(token_bytes_V)
    nats, total_bytes = 0.0, 0
    batches = max(1, max_tokens // (seq_len * batch_size))
    for tokens_BS1 in held_out_windows(source, seq_len, batch_size, batches):
        labels_BS = labels_at(tokens_BS1, 0, eos_token_id)
        hidden = model.hidden_states(tokens_BS1[:, :-1].to(device), mtp=False)
        nats += float(_loss(model, hidden.main_BSD, labels_BS.to(device)))
        total_bytes += int(bytes_V[labels_BS[labels_BS != IGNORE]].sum())
    return nats / math.log(2) / total_bytes


def _loss(model: Transformer, hidden_BSD: Tensor, labels_BS: Tensor) -> Tensor:
    return linear_cross_entropy(hidden_BSD.flatten(0, 1), model.lm_head.weight, labels_BS.flatten())
