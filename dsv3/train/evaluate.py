"""Bits per byte on held-out text: comparable between tokenizers, where a loss per token is not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from dsv3.data.batches import held_out_windows
from dsv3.data.prepared import PreparedSource
from dsv3.ops.cross_entropy import IGNORE
from dsv3.parallel.mesh import Axis
from dsv3.parallel.pipeline import PassInput
from dsv3.parallel.ranks import Ranks
from dsv3.train.step import MicroBatch, labels_at, pass_input

Case = tuple[PassInput, Tensor]
"""What enters a forward pass, and what it must predict, [B, S] int64."""


@torch.no_grad()
def bits_per_byte(
    nats: Callable[[Iterable[Case]], float],
    source: PreparedSource,
    token_bytes_V: np.ndarray,
    *,
    seq_len: int,
    batch_size: int,
    max_tokens: int,
    eos_token_id: int | None,
    isolate_at: int | None = None,
    ranks: Ranks | None = None,
) -> float:
    """-sum log2 p(token) / bytes of those tokens, over about the first `max_tokens` held-out tokens of `source`.

    nats: the main model's loss, summed over this process's (or pipeline's) cases. token_bytes_V: bytes of UTF-8 text
    behind each id (0 for special tokens, whose loss still counts). Targets in another document than their input are
    left out, as in training. isolate_at: as of `StepSettings`.
    """
    ranks = Ranks() if ranks is None else ranks
    bytes_V = torch.as_tensor(token_bytes_V)
    totals = torch.zeros(2, dtype=torch.float64)  # nats, bytes
    batches = max(1, max_tokens // (seq_len * batch_size))

    def cases() -> Iterator[Case]:
        for part in _dealt(held_out_windows(source, seq_len, batch_size, batches), ranks.mesh.data):
            labels_BS = labels_at(part.tokens_BS1, 0, eos_token_id)
            if part.is_padding:
                labels_BS = torch.full_like(labels_BS, IGNORE)
            totals[1] += int(bytes_V[labels_BS[labels_BS != IGNORE]].sum())
            here = MicroBatch(part.tokens_BS1.to(ranks.mesh.device), part.is_padding)
            yield pass_input(here, isolate_at), labels_BS.to(ranks.mesh.device)

    totals[0] = nats(cases())
    all_nats, all_bytes = ranks.sum_(totals).tolist()
    return float(all_nats / math.log(2) / all_bytes)


def _dealt(batches: Iterator[Tensor], data: Axis) -> Iterator[MicroBatch]:
    """Every so many-th batch; each process gets as many as the others, the last perhaps one that counts for nothing."""
    while group := list(itertools.islice(batches, data.size)):
        padding = data.index >= len(group)
        yield MicroBatch(group[0 if padding else data.index], padding)
