"""The weights that a run begins with, drawn or read from a checkpoint, by many processes as by one.

Each process makes the rows that it is to keep up to date and no others; what it needs of the rest comes from the
others, as after every step. So nobody ever holds more than its part of the model.
"""

from __future__ import annotations

from pathlib import Path

from dsv3.checkpoint.parts import read_parts
from dsv3.checkpoint.source import Checkpoint
from dsv3.model.initial import init_weights
from dsv3.model.transformer import Transformer
from dsv3.parallel.stages import RankModel
from dsv3.train.optim import MasterOptimizer


def begin_weights(model: Transformer | RankModel, optimizer: MasterOptimizer, *, seed: int, init: Path | None) -> None:
    """Give masters, model and its buffers their first values; all processes call it together.

    seed: of the draws; init: a checkpoint to read instead. Raises `UserError` if its tensors do not fit the model.
    """
    masters = optimizer.masters()
    held = {name: (rows, optimizer.sharding.part(name, rows).begin) for name, rows in masters.items()}
    if init is None:
        init_weights(model, seed=seed, std=model.config.initializer_range, held=lambda name, _: held[name])
    else:
        checkpoint = Checkpoint(init)
        checkpoint.check_fits(model.config)
        read_parts(checkpoint, model.config, {**held, **{name: (buffer, 0) for name, buffer in model.named_buffers()}})
    optimizer.load_masters(masters)
