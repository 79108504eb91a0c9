"""What the ranks of `test_watch.py` run: one of them is late, the others report."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsv3.model.balance import LoadBalancer
from dsv3.parallel.layout import balanced_layout
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.pipeline import Pipeline
from dsv3.parallel.shard import shard_parameters
from dsv3.parallel.watch import Watch
from dsv3.train.pipelined import pipelined_backward_step
from tests.parallel.pipeline_cases import EOS, batch, built
from tests.parallel.world import mesh_of

PATIENCE = 1.5  # seconds: a rank of a busy machine is not to look stuck before it is


def watched(folder: Path, mesh: Mesh, doing: Callable[[], str | None], work: Callable[[], object]) -> str:
    """What this rank's watch wrote while `work` ran."""
    with (folder / f"rank-{mesh.rank}").open("w") as file:
        watch = Watch(f"rank {mesh.rank}", PATIENCE, file)
        watch.beat(lambda: f"at {doing()}")
        work()
        watch.stop()
    return (folder / f"rank-{mesh.rank}").read_text()


def wait_for_reports(folder: Path, mesh: Mesh) -> None:
    """Be late until all ranks have reported, sentence and stack."""
    deadline = time.monotonic() + 60
    texts = [""]
    while not all("most recent call first" in text for text in texts):
        assert time.monotonic() < deadline, texts
        time.sleep(0.05)
        texts = [path.read_text() for path in folder.glob("rank-*")]
        texts += [""] * (mesh.world.size - len(texts))


def late_in_a_pipeline(*, seed: int, folder: Path) -> str:
    """The last rank, which has the losses, is late with the second micro-batch's."""
    mesh = mesh_of(pp=2)
    model = copy.deepcopy(built("D=1", seed, torch.float32))
    pipeline = Pipeline(model, balanced_layout(model.config, 2), mesh, schedule="1F1B")
    losses = []

    def spoil(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        losses.append(1)
        if len(losses) == 2:
            wait_for_reports(folder, mesh)

    handle = None if pipeline.model.norm is None else pipeline.model.norm.register_forward_pre_hook(spoil)
    report = watched(
        folder,
        mesh,
        pipeline.activity,
        lambda: pipelined_backward_step(
            pipeline,
            LoadBalancer(pipeline.model),
            batch("D=1", seed, 4),
            micro_batch_size=1,
            mtp_weight=0.3,
            eos_token_id=EOS,
        ),
    )
    if handle is not None:
        handle.remove()
    assert pipeline.activity() is None
    pipeline.close()
    return report


def late_for_parameters(*, seed: int, folder: Path) -> str:
    """The last rank is late before the second layer, whose parameters FSDP2 gathers."""
    mesh = mesh_of(dp_shard=2)
    model = copy.deepcopy(built("D=1", seed, torch.float32))
    shard_parameters(model, mesh, torch.float32)
    if mesh.rank == 1:
        model.layers[0].register_forward_hook(lambda *_: wait_for_reports(folder, mesh))
    tokens_BS = batch("D=1", seed, 2)
    return watched(folder, mesh, lambda: "the forward pass", lambda: model.hidden_states(tokens_BS))


def late_for_a_collective(*, folder: Path) -> str:
    mesh = mesh_of(dp_replicate=2)

    def work() -> None:
        if mesh.rank == 1:
            wait_for_reports(folder, mesh)
        mesh.world.sum_(torch.zeros(1))

    return watched(folder, mesh, lambda: "the sum", work)
