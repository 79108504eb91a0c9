"""The weights that a model begins with: the same numbers however it is divided, and wherever it lies.

A parameter is drawn in blocks of rows, each by a generator of its own that is named by seed, parameter and block. So a
process that holds some rows of some parameters draws these and no others, and they are the rows that one process
with the whole model draws. They are drawn on the CPU, in FP32, whatever becomes of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dsv3.model.norm import RMSNorm
from dsv3.model.router import Router

_BLOCK = 2**16  # elements that one generator draws, or one row if that has more

Held = Callable[[str, Tensor], tuple[Tensor, int]]
"""(a parameter's name, the parameter as the model has it) -> (the rows that are here, the first one's number)."""


@torch.no_grad()
def init_weights(
    model: nn.Module, *, seed: int, std: float, held: Held = lambda name, parameter: (parameter, 0)
) -> None:
    """Draw all weights of a `Transformer`, or of a part of it under the same names: norms 1, biases 0, else normal."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            rows, first = held(f"{path}.{name}", parameter)
            if isinstance(module, RMSNorm):
                rows.fill_(1.0)
            else:
                fill_normal(rows, f"{path}.{name}", seed=seed, std=std, first=first)
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            module.e_score_correction_bias.zero_()


@torch.no_grad()
def fill_normal(rows: Tensor, name: str, *, seed: int, std: float, first: int = 0) -> None:
    """Draw `rows` (any dtype, any device), which are rows [first, first + len(rows)) of the parameter `name`.

    Normal of mean 0 and standard deviation `std`. Needs the memory of one block besides.
    """
    if not rows.numel():
        return
    width = math.prod(rows.shape[1:])
    block_rows = max(_BLOCK // width, 1)
    end = first + rows.shape[0]
    for block in range(first // block_rows, -(-end // block_rows)):
        start = block * block_rows
        begin, stop = max(first, start), min(end, start + block_rows)
        # numpy draws one after the other, so what comes first does not depend on how many follow.
        drawn = _generator(seed, name, block).standard_normal((stop - start) * width, dtype=np.float32)
        values = torch.from_numpy(drawn[(begin - start) * width :]).mul_(std)
        rows[begin - first : stop - first].copy_(values.view(stop - begin, *rows.shape[1:]))


def _generator(seed: int, name: str, block: int) -> np.random.Generator:
    """Philox: its key is so wide that no two blocks of a model meet the same numbers by chance."""
    key = hashlib.blake2b(f"{seed} {name} {block}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype="<u8")))
