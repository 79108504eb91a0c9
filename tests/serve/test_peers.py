"""The engines that ours is compared with: one that fails or hangs ends with a clear line, and takes its own along."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers import process
from benchmarks.peers.process import Engine
from benchmarks.peers.protocol import Setup
from dsv3.errors import UserError

LOAD = """
import subprocess, sys, time
sys.path.insert(0, {peers!r})
from protocol import run

def load(setup):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # it holds the pipe open too
    def generate(prompts, new, emit):
        print("at work", file=sys.stderr, flush=True)
        if new == 2:
            time.sleep(600)
        if new == 3:
            sys.exit("no more memory")
        for index, prompt in enumerate(prompts):
            emit(index, prompt[:new])
    return generate, {{"child": child.pid}}

run(load)
"""


@pytest.fixture
def peer(tmp_path, monkeypatch) -> Engine:
    """One that copies its prompt, hangs at two tokens and breaks at three."""
    script = LOAD.format(peers=str(Path(process.__file__).parent))
    (tmp_path / "run_parrot.py").write_text(script, encoding="utf-8")
    monkeypatch.setattr(process, "__file__", str(tmp_path / "process.py"))
    setup = Setup("no model", "bf16", threads=1, sequences=1, length=8, prefill=8)
    return Engine("parrot", Path(sys.executable), setup, tmp_path / "log.txt")


def ends(pid: int) -> bool:
    """Whether it ends soon; one that has ended may wait for somebody to ask how."""
    for _ in range(500):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("new", "message"), [(2, "parrot gave no answer for 1 s: at work"), (3, "parrot ended: no more memory")]
)
def test_one_that_hangs_or_breaks_is_given_up_with_its_last_words(new, message, peer):
    assert peer.generate([[5, 6, 7]], 1)["tokens"] == [[5]]
    child = peer.description["child"]
    peer._patience = 1.0 if new == 2 else 60.0
    if new == 3:
        os.kill(child, signal.SIGKILL)
    with pytest.raises(UserError, match=message):
        peer.generate([[5, 6, 7]], new)
    assert ends(child)
