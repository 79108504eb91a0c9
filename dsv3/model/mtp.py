"""Multi-token prediction (eq. 21-25): depth k reads depth k-1's hidden and token i+k, and predicts token i+k+1.

Shapes: B batch, S positions of this depth, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.model.block import Block
from dsv3.model.context import Context
from dsv3.model.norm import RMSNorm
from dsv3.model.router import Routing
from dsv3.ops.recompute import recomputed


class MTPModule(nn.Module):
    """One depth. Embedding and output head are the main model's."""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.enorm = RMSNorm(D, config.rms_norm_eps)
        self.hnorm = RMSNorm(D, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.block = Block(config, config.num_hidden_layers + depth - 1)
        self.norm = RMSNorm(D, config.rms_norm_eps)

    def forward(self, hidden_BSD: Tensor, embedding_BSD: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
        """hidden: depth k-1's, after its final norm; embedding: of the token k places on. Returns depth k's hidden."""
        h_BSD, routing = self.block(self.merge(hidden_BSD, embedding_BSD), context)
        return self.norm(h_BSD), routing

    def merge(self, hidden_BSD: Tensor, embedding_BSD: Tensor) -> Tensor:
        """What enters the block.

        The released `eh_proj` expects the embedding *first*, the reverse of the order printed in eq. 21.
        """
        joined: Tensor = recomputed(_join, self.enorm(embedding_BSD), self.hnorm(hidden_BSD))
        out_BSD: Tensor = self.eh_proj(joined)
        return out_BSD


def _join(embedding_BSD: Tensor, hidden_BSD: Tensor) -> Tensor:
    return torch.cat((embedding_BSD, hidden_BSD), dim=-1)
