"""Packed token ids to batches: shuffled windows for training, windows in order for evaluation.

A training sequence is a pure function of the seed and its number. A run that is resumed therefore sees exactly
what it would have seen without the break, no data state needs to be saved, and the batch size may change.

Legend: B batch, S sequence length, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from dsv3.errors import UserError

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiples of it lie far apart
_ROUNDS = 6


class SequenceSampler:
    """One endless order of training sequences over `tokens` [N], from which a batch is any stretch.

    A sequence is a window of S + 1 ids. Windows start every S tokens, so that each token but the first is a
    target once an epoch; each window comes once an epoch, in an order that is new each epoch; a last incomplete
    window is left out. Raises `UserError` for a `seq_len` below 1 or data shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int) -> None:
        self._tokens = tokens
        self._seq_len = seq_len
        self._seed = seed
        self.num_windows = _count_windows(tokens, seq_len)

    def sequences(self, first: int, count: int) -> torch.Tensor:
        """Sequences number `first` (0, 1, ...) to `first + count - 1`: int64 [count, S + 1].

        Columns 0 to S - 1 are inputs, 1 to S their targets. An epoch may end and the next begin in between.
        """
        numbers_B = np.arange(first, first + count, dtype=np.uint64)
        windows = np.uint64(self.num_windows)
        windows_B = shuffled(numbers_B % windows, numbers_B // windows, self.num_windows, self._seed)
        return _gather(self._tokens, windows_B.astype(np.int64), self._seq_len)


def held_out_windows(
    tokens: np.ndarray, seq_len: int, batch_size: int, max_batches: int | None = None
) -> Iterator[torch.Tensor]:
    """The windows of `tokens` [N] in order, as int64 [b, S + 1] with b = B but for a smaller last batch.

    Each token but the first is a target at most once; an incomplete last window is left out. Raises
    `UserError`, when iterated, as `SequenceSampler` does.
    """
    count = _count_windows(tokens, seq_len)
    if max_batches is not None:
        count = min(count, max_batches * batch_size)
    for start in range(0, count, batch_size):
        yield _gather(tokens, np.arange(start, min(start + batch_size, count)), seq_len)


def _count_windows(tokens: np.ndarray, seq_len: int) -> int:
    if seq_len < 1:
        raise UserError(f"seq_len is {seq_len}, expected at least 1")
    if len(tokens) < seq_len + 1:
        raise UserError(
            f"the data has {len(tokens)} tokens, fewer than one window of seq_len + 1 = {seq_len + 1}; "
            "give more text or a smaller seq_len"
        )
    return (len(tokens) - 1) // seq_len


def _gather(tokens: np.ndarray, windows_B: np.ndarray, seq_len: int) -> torch.Tensor:
    indices_BS = windows_B[:, None] * seq_len + np.arange(seq_len + 1)
    return torch.from_numpy(tokens[indices_BS].astype(np.int64))


def shuffled(position: np.ndarray, epoch: np.ndarray, count: int, seed: int) -> np.ndarray:
    """What stands at `position` when 0 ... `count` - 1 are shuffled for `epoch`. All arrays uint64, [...].

    A Feistel network: it permutes the numbers of an even count of bits whatever its round function is, so the
    order needs neither memory nor history. Results at or past `count` are permuted again until they are below
    (cycle walking), which leaves a permutation of the numbers below. Written out instead of taken from numpy,
    whose random streams may change between versions, and with them the batches of a resumed run.
    """
    # At least 3 bits a half: over smaller domains a Feistel network reaches too few of the permutations.
    half = np.uint64(max(3, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = _mix(_mix(np.full_like(position, seed % 2**64)) + epoch)
    result = position.copy()
    outside = np.ones(position.shape, dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for round_ in range(_ROUNDS):
            round_key = _mix(key[outside] + np.uint64(round_))
            left, right = right, left ^ (_mix(round_key ^ right) & mask)
        result[outside] = left << half | right
        outside = result >= count
    return result


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers in which each bit of the input moves about half of the output's (splitmix64)."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
