"""The latent cache of many sequences: one pool of blocks, and what one pass over ragged chunks sees of it.

A pass is one row of packed tokens: a few of this sequence, one of that. Everything but attention treats them alike;
attention goes piece by piece. Chunks of equal size (decoding sequences) make one piece together, padded to the longest
and masked; what the padding reads is the sequence's own first token, so never a slot that nobody wrote.

Shapes: L layers (MTP too), T packed tokens, B sequences of a piece, S tokens each, X = d_c + d_h^R.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.model.cache import Cache, Piece
from dsv3.ops.latents import Latents

# Larger chunks are prompts: each is a piece of its own, without padding.
MAX_GROUPED = 8


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` of one sequence from position `start` on; `blocks` cover at least their end."""

    blocks: Sequence[int]
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class PagedCache:
    """[L, blocks, block_size, X], NaN until written."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_layers_with_mtp, num_blocks, block_size, config.latent_dim)
        self._data = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.block_size = block_size

    @property
    def nbytes(self) -> int:
        """Layers x blocks x block_size x (d_c + d_h^R) x itemsize."""
        return self._data.nbytes

    def poison(self, blocks: Sequence[int]) -> None:
        """Make the contents of `blocks` NaN, so that reading what nobody wrote shows."""
        if blocks:
            self._data[:, list(blocks)] = float("nan")

    def layer(self, layer: int) -> Tensor:
        """[slots, X]: slot = block * block_size + offset."""
        return self._data[layer].flatten(0, 1)


class PagedPass:
    """What one pass sees of the pool: a `model.cache.Cache` whose row of tokens is `chunks`, one behind the other."""

    def __init__(self, cache: PagedCache, chunks: Sequence[Chunk]) -> None:
        self._cache = cache
        device = cache._data.device
        tables = [torch.tensor(chunk.blocks, dtype=torch.int64) for chunk in chunks]
        positions = [torch.arange(chunk.start, chunk.end) for chunk in chunks]
        slots = [self._slots(table, where) for table, where in zip(tables, positions, strict=True)]
        self._positions_1T = torch.cat(positions).unsqueeze(0)
        self._slots_T = torch.cat(slots).to(device)
        self._reads: list[tuple[Tensor, int, Tensor | None]] = []  # slots [B, T], S, mask
        for _, group in itertools.groupby(enumerate(chunks), key=lambda item: _kind(*item)):
            members = [(chunk, tables[index]) for index, chunk in group]
            self._reads.append(self._read(members, device))

    def _slots(self, table: Tensor, positions: Tensor) -> Tensor:
        size = self._cache.block_size
        return table[..., positions // size] * size + positions % size

    def _read(self, members: list[tuple[Chunk, Tensor]], device: torch.device) -> tuple[Tensor, int, Tensor | None]:
        S = members[0][0].num_tokens
        longest = max(chunk.end for chunk, _ in members)
        positions_T = torch.arange(longest)
        if len(members) == 1:
            return self._slots(members[0][1], positions_T).unsqueeze(0).to(device), S, None
        slots_BT = torch.stack(
            [self._slots(table, positions_T.where(positions_T < chunk.end, 0)) for chunk, table in members]
        )
        starts_B = torch.tensor([chunk.start for chunk, _ in members])
        queries_BS = starts_B.unsqueeze(1) + torch.arange(S)
        mask_B1ST = (positions_T <= queries_BS.unsqueeze(2)).unsqueeze(1)
        return slots_BT.to(device), S, mask_B1ST.to(device)

    def scatter(self, x_T: Tensor) -> Tensor:
        """Tokens (or rows of anything, [T, ...]) as the row of the pass, [1, T, ...]."""
        return x_T.unsqueeze(0)

    def gather(self, x_T: Tensor) -> Tensor:
        """What the model says of the pass's tokens, [T, ...], in the order of the chunks."""
        return x_T

    def positions(self, layer: int, num_tokens: int) -> Tensor:
        """[1, T]: the same in every layer that this pass goes through."""
        return self._positions_1T

    def append(self, layer: int, latent_BSX: Tensor) -> list[Piece]:
        """Write the pass's latents to their slots; then one piece for each group of chunks."""
        pool = self._cache.layer(layer)
        pool.index_copy_(0, self._slots_T, latent_BSX[0])
        return [Piece(Latents(pool, slots_BT), S, mask) for slots_BT, S, mask in self._reads]


class Pass(Cache, Protocol):
    """A cache for one pass, and the way of tokens into the pass and out of it."""

    def scatter(self, x_T: Tensor) -> Tensor: ...

    def gather(self, x_T: Tensor) -> Tensor: ...


def grouped_order(chunk: Chunk) -> tuple[int, int]:
    """Sort by this and chunks that can share a piece lie side by side, of like length."""
    return chunk.num_tokens, chunk.end


def _kind(index: int, chunk: Chunk) -> tuple[int, int]:
    """Neighbours of one kind share a piece: as many tokens, and a length within a factor of two."""
    if chunk.num_tokens > MAX_GROUPED:
        return -1, index
    return chunk.num_tokens, chunk.end.bit_length()
