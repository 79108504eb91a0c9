"""The latent cache: all that attention needs of the past, d_c + d_h^R values per token and layer.

What lies in it is the *normed* c_KV and the *rotated* k_R, side by side (576 values for V3, against 32,768
for multi-head attention of that shape). Blocks append to it and get back what their queries look at; nobody else
needs to know how it is stored.

Shapes: B sequences, S tokens of this pass, T tokens attended to, X = d_c + d_h^R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.ops.latents import Latents


@dataclass(frozen=True)
class Piece:
    """A rectangular piece of a pass's attention: the next B * S tokens of the pass, S for each of B sequences."""

    latents: Latents  # of all tokens so far, the S new ones last unless a mask says otherwise
    num_queries: int  # S
    mask: Tensor | None = None  # [B, 1, S, T] bool, True where a query may look; None: causal


class Cache(Protocol):
    """What a model needs of a cache. Each layer counts its own tokens, since MTP layers run behind the main model."""

    def positions(self, layer: int, num_tokens: int) -> Tensor:
        """Where the next pass's `num_tokens` per row lie in their sequences: int64 on the CPU, [B or 1, S]."""
        ...

    def append(self, layer: int, latent_BSX: Tensor) -> list[Piece]:
        """Add the pass's latents; returns what its tokens attend to, piece after piece in the order of the pass."""
        ...


class LatentCache:
    """A contiguous cache for `batch_size` sequences of one common length, one slot row per block (MTP blocks too).

    Every layer has a length of its own, since MTP layer k runs k tokens behind the main model; `truncate` takes
    rejected drafts back. Slots past the length hold NaN until written: a read too far cannot go unnoticed.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._data = torch.full(
            (config.num_layers_with_mtp, batch_size, max_length, config.latent_dim),
            float("nan"),
            dtype=dtype,
            device=device,
        )
        self._lengths = [0] * config.num_layers_with_mtp

    def length(self, layer: int = 0) -> int:
        """Tokens held of `layer`."""
        return self._lengths[layer]

    def positions(self, layer: int, num_tokens: int) -> Tensor:
        """[1, S]: those behind the tokens held of `layer`, the same for every sequence."""
        start = self._lengths[layer]
        return torch.arange(start, start + num_tokens).unsqueeze(0)

    def append(self, layer: int, latent_BSX: Tensor) -> list[Piece]:
        """Add the latents of S more tokens; one piece with those of all T tokens so far."""
        start = self._lengths[layer]
        end = start + latent_BSX.shape[1]
        if end > self._data.shape[2]:
            raise UserError(f"the latent cache holds {self._data.shape[2]} tokens, {end} are needed: make it longer")
        self._data[layer, :, start:end] = latent_BSX
        self._lengths[layer] = end
        return [Piece(Latents(self._data[layer, :, :end]), latent_BSX.shape[1])]

    def truncate(self, layer: int, length: int) -> None:
        """Forget the tokens of `layer` from `length` on."""
        if not 0 <= length <= self._lengths[layer]:
            raise ValueError(f"layer {layer} holds {self._lengths[layer]} tokens, cannot be cut to {length}")
        self._lengths[layer] = length

    @property
    def nbytes(self) -> int:
        """Bytes allocated: layers x batch x max_length x (d_c + d_h^R) x itemsize."""
        return self._data.nbytes
