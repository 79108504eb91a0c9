"""Latents of B sequences, T of each: side by side, or scattered over a pool that many sequences share.

Shapes: B sequences, T tokens, P places of a pool, X = d_c + d_h^R.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Latents:
    """`rows` [B, T, X]; or a pool [P, X] and `slots_BT` (int64), which says where in it each token's latent lies."""

    rows: Tensor
    slots_BT: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        B, T = (self.rows if self.slots_BT is None else self.slots_BT).shape[:2]
        return B, T

    def first(self, length: int) -> Latents:
        """Those of each sequence's first tokens."""
        if self.slots_BT is None:
            return Latents(self.rows[:, :length])
        return Latents(self.rows, self.slots_BT[:, :length])

    def side_by_side(self) -> Tensor:
        """[B, T, X]: a copy if they are scattered."""
        if self.slots_BT is None:
            return self.rows
        return self.rows.index_select(0, self.slots_BT.flatten()).unflatten(0, self.slots_BT.shape)
