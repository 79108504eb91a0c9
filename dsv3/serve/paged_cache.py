"""The latent cache of many sequences: one pool of blocks, and what one pass over ragged chunks sees of it.

A pass is one row of packed tokens: a few of this sequence, one of that. Everything but attention treats them alike;
attention goes piece by piece. Chunks of equal size (decoding sequences) make one piece together, padded to the longest
and masked; what the padding reads is the sequence's own first token, so never a slot that nobody wrote.

Shapes: L layers (MTP too), T packed tokens, B sequences of a piece, S tokens each, X = d_c + d_h^R.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.model.cache import Cache, Piece
from dsv3.model.router import Routing
from dsv3.ops import native
from dsv3.ops.latents import Latents

IntArray = npt.NDArray[np.int64]

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

    def address(self, layer: int) -> int:
        """Where in memory that layer's slots begin."""
        return self._data.data_ptr() + layer * self._data.stride(0) * self._data.itemsize


class PagedPass:
    """What one pass sees of the pool: a `model.cache.Cache` whose row of tokens is `chunks`, one behind the other."""

    always_fused = False  # whether `fused` takes it even if it has many tokens

    def __init__(self, cache: PagedCache, chunks: Sequence[Chunk]) -> None:
        self._cache = cache
        device = cache._data.device
        # All chunks at once, and in NumPy, which is many times as quick to begin with so small an operation as torch.
        tables = np.array([block for chunk in chunks for block in chunk.blocks])  # one behind the other
        sizes = np.array([(chunk.start, chunk.num_tokens, len(chunk.blocks)) for chunk in chunks])
        starts_B, counts_B, lengths_B = sizes.T
        tables_at_B = lengths_B.cumsum() - lengths_B
        chunk_T = np.arange(len(chunks)).repeat(counts_B)
        positions_T = np.arange(len(chunk_T)) + (starts_B - counts_B.cumsum() + counts_B)[chunk_T]
        self._positions_1T = torch.from_numpy(positions_T).unsqueeze(0)
        self._slots_T = self._slots(tables, tables_at_B[chunk_T], positions_T).to(device)
        self._reads: list[tuple[Tensor, int, Tensor | None]] = []  # slots [B, T], S, mask
        self._described: tuple[native.Pass, object] | None = None
        begin = 0
        for _, group in itertools.groupby(enumerate(chunks), key=lambda item: _kind(*item)):
            members = [chunk for _, chunk in group]
            S, longest = members[0].num_tokens, max(chunk.end for chunk in members)
            at_B1, starts_B1 = (x_B[begin : begin + len(members), None] for x_B in (tables_at_B, starts_B))
            begin += len(members)
            positions_1T = np.arange(longest)[None]
            mask_B1ST = None
            if len(members) > 1:
                queries_BS = starts_B1 + np.arange(S)
                mask_B1ST = torch.from_numpy(positions_1T <= queries_BS[:, None, :, None]).to(device)
                positions_1T = np.where(positions_1T < starts_B1 + S, positions_1T, 0)
            self._reads.append((self._slots(tables, at_B1, positions_1T).to(device), S, mask_B1ST))

    def _slots(self, tables: IntArray, at: IntArray, positions: IntArray) -> Tensor:
        """Of positions in texts whose tables begin `at` these places of `tables`."""
        size = self._cache.block_size
        return torch.from_numpy(tables[at + positions // size] * size + positions % size)

    @property
    def num_tokens(self) -> int:
        """T, of all chunks."""
        return len(self._slots_T)

    def described(self, cos: Tensor, sin: Tensor) -> native.Pass:
        """The pass as `native`'s kernels take it, with the angles [1, T, R / 2] of its tokens: equal in all layers."""
        if self._described is None:
            described = []
            for slots_BT, S, mask in self._reads:
                looks = None if mask is None else mask.data_ptr()
                described.append(native.Piece(slots_BT.data_ptr(), looks, 0, slots_BT.shape[0], S, slots_BT.shape[1]))
            pieces = (native.Piece * len(described))(*described)
            angles, sizes = (cos.data_ptr(), sin.data_ptr()), (self.num_tokens, len(pieces))
            passed = native.Pass(*angles, self._slots_T.data_ptr(), ctypes.addressof(pieces), *sizes)
            self._described = passed, (pieces, cos, sin)  # what the addresses are of, kept
        return self._described[0]

    def scatter(self, x_T: Tensor) -> Tensor:
        """Tokens (or rows of anything, [T, ...]) as the row of the pass, [1, T, ...]."""
        return x_T.unsqueeze(0)

    def gather(self, x_T: Tensor) -> Tensor:
        """What the model says of the pass's tokens, [T, ...], in the order of the chunks."""
        return x_T

    def counts(self, routing: Routing) -> Tensor:
        """How many of the pass's tokens chose each expert, [E]."""
        return routing.counts_E

    def positions(self, layer: int, num_tokens: int) -> Tensor:
        """[1, T]: the same in every layer that this pass goes through."""
        return self._positions_1T

    def append(self, layer: int, latent_BSX: Tensor) -> list[Piece]:
        """Write the pass's latents to their slots; then one piece for each group of chunks."""
        pool = self._cache.layer(layer)
        pool.index_copy_(0, self._slots_T, latent_BSX[0])
        return [Piece(Latents(pool, slots_BT), S, mask) for slots_BT, S, mask in self._reads]

    def address(self, layer: int) -> int:
        """Of the pool's layer, for `native`'s kernels."""
        return self._cache.address(layer)


class Pass(Cache, Protocol):
    """A cache for one pass, and the way of tokens into the pass and out of it."""

    def scatter(self, x_T: Tensor) -> Tensor: ...

    def gather(self, x_T: Tensor) -> Tensor: ...

    def counts(self, routing: Routing) -> Tensor: ...


def grouped_order(chunk: Chunk) -> tuple[int, int]:
    """Sort by this and chunks that can share a piece lie side by side, of like length."""
    return chunk.num_tokens, chunk.end


def _kind(index: int, chunk: Chunk) -> tuple[int, int]:
    """Neighbours of one kind share a piece: as many tokens, and a length within a factor of two."""
    if chunk.num_tokens > MAX_GROUPED:
        return -1, index
    return chunk.num_tokens, chunk.end.bit_length()
