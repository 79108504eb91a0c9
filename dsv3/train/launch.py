"""A training run's processes: joined for its duration, restarted and resumed by torchrun when one dies."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dsv3.device import pick_device
from dsv3.errors import UserError
from dsv3.parallel.mesh import Layout, connect, disconnect
from dsv3.parallel.ranks import Ranks
from dsv3.parallel.watch import Watch
from dsv3.train.config import TrainConfig

_PATIENCE = 0.8  # share of the time-out after which a process says where it is stuck
_MANNERS = 3.0  # seconds


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[Ranks]:
    """This process among those that torchrun started, laid out as `config` says; alone without torchrun.

    Raises `UserError` if the sizes do not make up the processes there are. A process that gets stuck says where, before
    the others give up waiting for it.
    """
    layout = Layout(dp_replicate=config.dp_replicate, dp_shard=config.dp_shard, ep=config.ep, pp=config.pp)
    mesh = connect(layout, pick_device(config.device), timeout_seconds=config.comm_timeout)
    watch = Watch(f"rank {mesh.rank}", _PATIENCE * config.comm_timeout) if mesh.distributed else None
    try:
        yield Ranks(mesh, watch)
    except Exception as error:
        if mesh.distributed and not isinstance(error, UserError):
            # torchrun blames the first process that it finds gone. Let that be the one that died and not one that
            # lost contact with it.
            time.sleep(_MANNERS)
        raise
    finally:
        if watch is not None:
            watch.stop()
        disconnect()


def run_to_resume(config: TrainConfig) -> Path | None:
    """The folder of the run that torchrun has restarted these processes for, if it had got as far as being one.

    torchrun repeats the command line: what began as a new run goes on from its newest checkpoint.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return config.out if restarted and (config.out / "train.json").is_file() else None
