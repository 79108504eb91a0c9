"""A rank that waits too long says what it was doing, in words, and the one that is late can be told."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.parallel.test_restart import command, environment, text  # noqa: F401
from tests.parallel.watch_cases import late_for_a_collective, late_for_parameters, late_in_a_pipeline


def sentence(report: str) -> str:
    """The first line; behind it lie the stacks."""
    line, _, rest = report.partition("\n")
    assert "most recent call first" in rest
    return line


def test_a_rank_that_waits_in_a_pipeline_names_operation_and_rank(world2, seed, tmp_path):
    waiting, late = map(sentence, world2.run(late_in_a_pipeline, seed=seed, folder=tmp_path))
    assert waiting.startswith("rank 0 has made no progress")
    # Rank 0 has run both forward passes that 1F1B lets it run ahead, and one of the backward passes.
    assert "of 8, B (backward) of micro-batch 1 of stage 0, waiting for a gradient from rank 1" in waiting
    assert "Mail.receive" in waiting
    assert late.startswith("rank 1 has made no progress")
    assert "F (forward) of micro-batch 1 of stage 1" in late
    assert "waiting for" not in late and "torch.distributed" not in late


def test_a_rank_that_waits_in_a_collective_names_it(world2, tmp_path):
    waiting, late = map(sentence, world2.run(late_for_a_collective, folder=tmp_path))
    assert "at the sum; in torch.distributed's all_reduce, called by Axis.sum_ (dsv3.parallel.mesh" in waiting
    assert "torch.distributed" not in late


def test_a_rank_that_waits_for_sharded_parameters_names_the_layer(world2, seed, tmp_path):
    waiting, late = map(sentence, world2.run(late_for_parameters, seed=seed, folder=tmp_path))
    assert "in torch.distributed's" in waiting and "called by Transformer._run" in waiting
    assert "torch.distributed" not in late and "in Transformer._run" in late


@pytest.mark.slow
def test_a_run_with_a_stuck_rank_ends_and_tells_which(tmp_path, text):  # noqa: F811
    """The process of rank 1 sleeps in the third step; the other gives up after --comm-timeout, 20 seconds."""
    (tmp_path / "stuck.py").write_text(
        "import os, sys, time\n"
        "from dsv3.cli import main\n"
        "from dsv3.train.trainer import Trainer\n"
        "whole = Trainer.train_step\n"
        "def train_step(trainer):\n"
        "    if trainer.step == 2 and os.environ['RANK'] == '1':\n"
        "        time.sleep(600)\n"
        "    return whole(trainer)\n"
        "Trainer.train_step = train_step\n"
        "main(sys.argv[1:])\n"
    )
    arguments = command(tmp_path / "run", text, "pp 2", restarts=0)
    at = arguments.index("-m", 3)
    arguments[at : at + 2] = [str(tmp_path / "stuck.py")]
    arguments[3:3] = ["--shutdown-timeout", "1"]
    job = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=150)
    assert job.returncode != 0
    waiting, late = (re.search(rf"rank {rank} has made no progress.*", job.stderr)[0] for rank in (0, 1))
    assert "after 2 steps of 8, at operation" in waiting and "from rank 1" in waiting
    assert "after 2 steps of 8; in Trainer.fit" in late
