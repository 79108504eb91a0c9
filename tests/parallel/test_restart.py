"""A process that is killed: torchrun names it, starts all again, and the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3.train.run import Run

STEPS = 8
LAYOUTS = {
    "ep 2": (2, "--ep 2"),
    "pp 2": (2, "--pp 2 --micro-batch-size 1"),
    "pp 2 x ep 2": (4, "--pp 2 --ep 2 --micro-batch-size 1 --schedule 1F1B"),
}
# Each rank of each layout in turn; one of them in every run of the suite.
KILLED = [
    pytest.param(layout, rank, marks=[] if (layout, rank) == ("pp 2", 1) else pytest.mark.slow)
    for layout, (processes, _) in LAYOUTS.items()
    for rank in range(processes)
]


def command(out: Path, text: Path, layout: str, restarts: int) -> list[str]:
    processes, options = LAYOUTS[layout]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    train = ["-m", "dsv3", "train", "--out", str(out), "--data", str(text), "--model", "micro", *options.split()]
    settings = {
        "tokens": STEPS * 4 * 32,
        "batch-size": 4,
        "seq-len": 32,
        "save-every": 2,
        "eval-every": 99,
        "eval-tokens": 64,
        "sample-tokens": 0,
        "device": "cpu",
        "dtype": "float32",
        "comm-timeout": 20,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [*torchrun, "--max-restarts", str(restarts), *train, *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def workers(launcher: int) -> dict[int, int]:
    """Process ids of torchrun's children by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
        except (OSError, ValueError):
            continue
        if parent == launcher and rank:
            found[int(rank[1])] = int(folder.name)
    return found


def losses(out: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in Run(out).records() if "loss" in record]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"line {i} says {i * i % 97} and then {i * 7 % 13}\n" for i in range(2000)))
    return file


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory, text) -> tuple[str, list[tuple[int, float]]]:
    """A layout, and the losses of the run under it that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    whole = command(out, text, request.param, restarts=0)
    subprocess.run(whole, env=environment(), check=True, timeout=300, capture_output=True)
    return request.param, losses(out)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds torchrun's children in /proc")
@pytest.mark.parametrize(("whole", "rank"), KILLED, indirect=["whole"])
def test_killed_in_the_middle_it_goes_on_by_itself(tmp_path, text, whole, rank):
    layout, undisturbed = whole
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out, text, layout, restarts=1),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not Run(out).checkpoints():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(workers(process.pid)[rank], signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert f"local_rank: {rank}" in output and "-9" in output, output
    assert losses(out) == undisturbed
    # It went on from the checkpoint and did not begin anew.
    assert (out / "metrics.jsonl").read_text().count('"step":1,') == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds torchrun's children in /proc")
def test_without_restarts_the_job_ends_and_names_who_died(tmp_path, text):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out, text, "ep 2", restarts=0),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not (out / "train.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(workers(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert re.search(r"rank\s*:\s*1", output) and "SIGKILL" in output, output
