"""Processes that save checkpoints without a pause, killed at moments of chance."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLED = """
import os, random, signal, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)
from dsv3.checkpoint.locate import run_checkpoints
from dsv3.model.transformer import Transformer
from dsv3.train.checkpoint import read_checkpoint, write_snapshot
from dsv3.train.ema import Ema
from dsv3.train.optim import MasterAdamW
from dsv3.train.snapshot import CheckpointSaver, Snapshot
from tests.variants import BASE

run, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
KEEP = 2


def training():
    model = Transformer(BASE)
    optimizer = MasterAdamW(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.0, 1.0)  # so that there are moments
    return model, optimizer, Ema(optimizer.masters())


def everything(model, optimizer, ema):
    return [*optimizer.masters().values(), *optimizer.state().values(), *ema.state().values()]


def save_forever(state, pipe, first_is_whole):
    done = run_checkpoints(run)
    step = read_checkpoint(done[-1], *state) if done else 0
    saver = CheckpointSaver(run, lambda folder, snap: write_snapshot(folder, snap, run / "tokenizer"), keep=KEEP)
    if not first_is_whole:
        os.write(pipe, b"+")
    for step in range(step + 1, 10**6):
        with torch.no_grad():
            for value in everything(*state):
                value.fill_(step)
        model, optimizer, ema = state
        ema.load_state({**ema.state(), "updates": torch.tensor(step)})
        saver.save(Snapshot.of(model, optimizer, step, ema=ema))
        if first_is_whole:
            saver.wait()
            os.write(pipe, b"+")
            first_is_whole = False


state = training()
newest = 0
for life in range(4):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            save_forever(state, writing, first_is_whole=life % 2 == 1)
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"+"
    time.sleep(rng.uniform(0, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    done = run_checkpoints(run)
    numbers = [int(folder.name.removeprefix("step-")) for folder in done]
    assert max(numbers, default=0) >= newest + life % 2, (numbers, newest)
    newest = max(numbers, default=0)
    # The newest ones without a gap; one more between a checkpoint's arrival and the removal of the oldest.
    assert numbers == list(range(newest - len(numbers) + 1, newest + 1)), numbers
    assert min(KEEP, newest) <= len(numbers) <= KEEP + 1, numbers
    for folder, step in zip(done, numbers, strict=True):
        assert read_checkpoint(folder, *state) == step
        assert all(bool((value == step).all()) for value in everything(*state)), (folder, step)
    left = [path.name for path in (run / "checkpoints").glob("*") if path not in done]
    assert all(name.startswith(".") and name.endswith((".partial", ".old")) for name in left), left
CheckpointSaver(run, print, keep=KEEP)
assert run_checkpoints(run) == sorted((run / "checkpoints").iterdir())
"""


@pytest.mark.skipif(
    not hasattr(sys, "getwindowsversion") and sys.platform == "darwin", reason="forks with torch loaded"
)
def test_sigkill_at_any_moment_leaves_older_checkpoints_whole(seed, tmp_path):
    """One process after another saves as fast as it can and is killed; the next goes on from the newest checkpoint."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(seed)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
