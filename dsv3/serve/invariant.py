"""Batch-invariant computing on a CPU: a token's numbers, to the last bit, depend on its own text alone.

Batching changes results because a matrix product chooses its order of additions by its shape. Our own kernels do not:
each sum is taken in one order whatever is computed beside it. Where they take all of a model, every pass goes through
them, however many tokens it has (`KernelPass`), and nothing else needs to be done.

Elsewhere every product has one shape: a pass is made of tiles of `TILE` tokens, and each linear map is computed tile
by tile, filled up with zeros where there are fewer rows (an expert's). In a product of a fixed shape a row's result
does not depend on its place nor on the other rows (tests hold this machine to it). Attention treats every token as a
sequence of its own with one query, over as many keys as its position rounded up to `KEYS`; what lies behind it is
masked and adds exact zeros. So it does not matter which tokens share a pass, where a prompt is cut, or what came from
the prefix cache.

The price: a prompt's attention goes over the latents once for each token, and products have 16 rows, or our kernels',
where oneDNN's are faster with hundreds.

Shapes: T tokens, R rows of the pass (a multiple of TILE), K keys, X latent, D model, I and O a map's input and output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsv3.model.cache import Piece
from dsv3.model.router import Routing
from dsv3.model.transformer import Transformer
from dsv3.ops import native
from dsv3.ops.experts import few_rows
from dsv3.ops.latents import Latents
from dsv3.ops.packed import linear_by
from dsv3.serve.fused import FusedBlock
from dsv3.serve.paged_cache import Chunk, PagedCache, PagedPass

TILE = 16
KEYS = 64


def pass_kind(model: Transformer) -> type[KernelPass] | type[TiledPass]:
    """What passes of this model have to be."""
    blocks = [*model.layers, *(module.block for module in model.mtp)]
    return KernelPass if all(isinstance(block, FusedBlock) for block in blocks) else TiledPass


class KernelPass(PagedPass):
    """`PagedPass`, through our own kernels whatever its size."""

    always_fused = True


class TiledPass:
    """Takes the place of `PagedPass`: tokens in tiles whose members have equally many keys."""

    def __init__(self, cache: PagedCache, chunks: Sequence[Chunk]) -> None:
        self._cache = cache
        size = cache.block_size
        tiles: list[list[tuple[Chunk, int]]] = []  # (chunk, position)
        for chunk in chunks:
            for position in range(chunk.start, chunk.end):
                if not tiles or len(tiles[-1]) == TILE or tiles[-1][0][1] // KEYS != position // KEYS:
                    tiles.append([])
                tiles[-1].append((chunk, position))
        longest = (max(chunk.end for chunk in chunks) // KEYS + 1) * KEYS
        tables = {
            id(chunk): F.pad(torch.tensor(chunk.blocks), (0, max(-(-longest // size) - len(chunk.blocks), 0)))
            for chunk in chunks
        }
        rows: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        self._reads: list[tuple[Tensor, Tensor]] = []
        for number, tile in enumerate(tiles):
            rows += range(number * TILE, number * TILE + len(tile))
            positions += [position for _, position in tile] + [0] * (TILE - len(tile))
            slots += [chunk.blocks[position // size] * size + position % size for chunk, position in tile]
            self._reads.append(self._read(tile, tables))
        self._rows_T, self._num_rows = torch.tensor(rows), len(tiles) * TILE
        self._positions_1R = torch.tensor([positions])
        self._slots_T = torch.tensor(slots)

    def _read(self, tile: list[tuple[Chunk, int]], tables: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Slots [TILE, K] and mask [TILE, 1, 1, K]. Rows that are no tokens repeat the first."""
        size = self._cache.block_size
        tile = tile + tile[:1] * (TILE - len(tile))
        num_keys = (tile[0][1] // KEYS + 1) * KEYS
        keys_K = torch.arange(num_keys)
        mask_RK = keys_K <= torch.tensor([[position] for _, position in tile])
        keys_RK = keys_K.where(mask_RK, 0)
        blocks = torch.stack([tables[id(chunk)][: -(-num_keys // size)] for chunk, _ in tile])
        return blocks.gather(1, keys_RK // size) * size + keys_RK % size, mask_RK[:, None, None]

    def scatter(self, x_T: Tensor) -> Tensor:
        """Tokens (or rows of anything, [T, ...]) to the rows of the pass, [1, R, ...]; the others are zero."""
        return x_T.new_zeros(1, self._num_rows, *x_T.shape[1:]).index_copy_(1, self._rows_T, x_T.unsqueeze(0))

    def gather(self, x_R: Tensor) -> Tensor:
        """The way back: rows [R, ...] of the pass to tokens [T, ...]."""
        return x_R[self._rows_T]

    def counts(self, routing: Routing) -> Tensor:
        """How many tokens chose each expert, [E]; the rows that fill up a tile are none."""
        return torch.bincount(self.gather(routing.expert_ids_TK).flatten(), minlength=len(routing.counts_E))

    def positions(self, layer: int, num_tokens: int) -> Tensor:
        """[1, R], in every layer."""
        return self._positions_1R

    def append(self, layer: int, latent_BSX: Tensor) -> list[Piece]:
        """Write the tokens' latents; each tile is a piece of TILE sequences with one query each."""
        pool = self._cache.layer(layer)
        pool.index_copy_(0, self._slots_T, latent_BSX[0, self._rows_T])
        return [Piece(Latents(pool, slots), 1, mask) for slots, mask in self._reads]


class FixedShapes(TorchFunctionMode):
    """Inside, linear maps are computed by our own kernel, and products that it does not take TILE rows at a time."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is few_rows:  # our kernel for experts takes each sum in one order: always that one
            return True
        if func in (F.linear, linear_by):
            x, weight = args[:2]
            if func is linear_by and (stored := weight.in_memory()) is not None:
                fast = native.linear(x.reshape(-1, x.shape[-1]).contiguous(), stored)
                if fast is not None:
                    return fast.unflatten(0, x.shape[:-1])
            return _by_tiles(x.reshape(-1, x.shape[-1]), lambda tile: func(tile, weight)).unflatten(0, x.shape[:-1])
        if func is torch.mm:
            product = _by_tiles(args[0], lambda tile: func(tile, args[1]))
            return kwargs["out"].copy_(product) if "out" in kwargs else product
        return func(*args, **kwargs)


def _by_tiles(x_NI: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """apply(x) [N, O], computed for TILE rows at a time, zeros behind the last."""
    N = len(x_NI)
    short = -N % TILE
    padded = F.pad(x_NI, (0, 0, 0, short)) if short else x_NI
    parts = [apply(tile) for tile in padded.split(TILE)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:N]
