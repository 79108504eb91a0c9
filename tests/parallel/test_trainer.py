"""A run over several processes is the run of one: its figures, its checkpoints, and going on under any layout."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsv3.checkpoint.hf_config import load_config
from dsv3.checkpoint.pretrained import load_pretrained
from dsv3.model.transformer import Transformer
from dsv3.parallel.ranks import Ranks
from dsv3.train.router_record import read_router_record, router_records
from dsv3.train.run import Run
from dsv3.train.trainer import resume_run
from tests.parallel.trainer_cases import (
    Silent,
    beginning,
    failing_start,
    resume_together,
    run_together,
    settings,
    whole_run,
)
from tests.parallel.world import mesh_of

TWO = {"zero ep": {"dp_replicate": 2, "ep": 2}, "fsdp": {"dp_shard": 2}}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        lines = [f"def f{i}_{j}(x, y={j * i}):\n    return x + y * {j}\n" for j in range(12)]
        (folder / f"module_{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text) -> Run:
    return whole_run(settings(tmp_path_factory.mktemp("alone") / "run", text)).run


def assert_same_figures(run: Run, alone: Run, first: int = 0) -> None:
    ours, theirs = run.records(), alone.records()
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for a, b in zip(ours[first:], theirs[first:], strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio", "bits_per_byte", "ema_bits_per_byte"):
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=2e-3), (a["step"], key)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name} {name}": value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()
    }


def assert_same_checkpoint(ours: Path, theirs: Path, tolerance: float) -> None:
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    a, b = tensors(ours), tensors(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("layout", TWO.values(), ids=TWO)
def test_the_run_of_two_processes_is_that_of_one(world2, tmp_path, text, alone, layout):
    world2.run(run_together, layout=layout, config=settings(tmp_path / "run", text))
    run = Run(tmp_path / "run")
    assert_same_figures(run, alone)
    # Under one layout a run that was interrupted is, bit for bit, the run that was not.
    records = [record["loss"] for record in run.records() if "loss" in record]
    last = tensors(run.checkpoints()[-1])
    forget_after(run, 4)
    world2.run(resume_together, layout=layout, run=run.path)
    assert [record["loss"] for record in run.records() if "loss" in record] == records
    assert all(torch.equal(value, last[name]) for name, value in tensors(run.checkpoints()[-1]).items())
    assert_same_checkpoint(run.checkpoints()[0], alone.checkpoints()[0], tolerance=2e-3)
    # The same bytes apart from the values: any tool that reads the one reads the other.
    assert sorted((p.name, p.stat().st_size) for p in run.checkpoints()[-1].glob("*.safetensors")) == sorted(
        (p.name, p.stat().st_size) for p in alone.checkpoints()[-1].glob("*.safetensors")
    )


def test_a_run_goes_on_under_any_layout(world2, world4, tmp_path, alone):
    """One process to step 4, two to 8, four to the end: each reads what the one before wrote."""
    run = Run(tmp_path / "run")
    shutil.copytree(alone.path, run.path)
    forget_after(run, 4)
    world2.run(resume_together, layout={"dp_replicate": 2, "ep": 2}, run=run.path)
    assert_same_checkpoint(run.checkpoints()[1], alone.checkpoints()[1], tolerance=5e-3)
    forget_after(run, 8)
    world4.run(resume_together, layout={"dp_replicate": 2, "dp_shard": 2, "ep": 2}, run=run.path)
    assert_same_figures(run, alone)
    forget_after(run, 8)
    resume_run(run.path).fit(Silent())
    assert_same_figures(run, alone)


def test_loading_changes_nothing(world2, tmp_path, alone):
    """What two processes read and write again at once are the same tensors, moments and averages too, bit for bit."""
    run = Run(tmp_path / "run")
    shutil.copytree(alone.path, run.path)
    for layout in TWO.values():
        forget_after(run, 12)
        shutil.move(run.checkpoints()[-1], tmp_path / "before")
        shutil.copytree(tmp_path / "before", run.path / "checkpoints" / "step-00000012")
        world2.run(save_again, layout=layout, run=run.path)
        assert_same_checkpoint(run.checkpoints()[-1], tmp_path / "before", tolerance=0.0)
        shutil.rmtree(tmp_path / "before")


def save_again(layout: dict[str, int], run: Path) -> None:
    trainer = resume_run(run, Ranks(mesh_of(**layout)))
    with trainer.saver:
        trainer.save()


def forget_after(run: Run, step: int) -> None:
    for folder in run.checkpoints():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def test_a_step_spoiled_on_one_rank_is_left_out_by_all(world2, tmp_path, text):
    config = settings(tmp_path / "run", text, tokens=str(3 * 6 * 32), eval_every=9, save_every=9, ema_decay=None)
    world2.run(run_together, layout={"dp_replicate": 2, "ep": 2}, config=config, nan_at=2)
    records = Run(tmp_path / "run").records()
    assert "not finite" in records[1]["skipped"] or "nan" in records[1]["skipped"]
    assert "on rank" in records[1]["skipped"]
    assert "loss" in records[2] and "loss" in records[3]


@pytest.mark.parametrize("init", [False, True], ids=["drawn", "read"])
@pytest.mark.parametrize(
    ("layout", "spread"),
    [
        ({"dp_replicate": 2, "ep": 2}, {}),
        ({"dp_shard": 2}, {}),
        ({"pp": 2}, {"pp": 2, "schedule": "DualPipe", "micro_batch_size": 1}),
        ({"pp": 2, "dp_shard": 2}, {"pp": 2, "dp_shard": 2, "schedule": "1F1B", "micro_batch_size": 1}),
    ],
    ids=["zero ep", "fsdp", "pp", "pp fsdp"],
)
def test_every_layout_begins_with_the_weights_of_one_process(request, tmp_path, text, alone, layout, spread, init):
    """Each rank has drawn, or read, its rows and no others; together they have all."""
    world = request.getfixturevalue(
        f"world{math.prod(layout.get(axis, 1) for axis in ('dp_replicate', 'dp_shard', 'pp'))}"
    )
    start = {"init": str(alone.checkpoints()[0]), "model": None} if init else {"seed": 3}
    config = settings(tmp_path / "run", text, **start, **spread)
    if init:
        model = load_pretrained(alone.checkpoints()[0], dtype=torch.float32)
    else:
        model = Transformer(load_config(alone.path))
        model.init_weights(3)
    whole, seen = model.state_dict(), {name: set() for name in model.state_dict()}
    for held in world.run(beginning, layout=layout, config=config):
        for key, (first, rows) in held.items():
            name = key.removesuffix(" in the model")
            assert torch.equal(rows, whole[name][first : first + len(rows)]), key
            seen[name] |= set(range(first, first + len(rows)))
    assert all(rows == set(range(len(whole[name]))) for name, rows in seen.items())


@pytest.mark.parametrize(
    ("layout", "spread"),
    [
        ({"dp_replicate": 2, "ep": 2}, {}),
        ({"dp_shard": 2}, {"micro_batch_size": 2}),  # the last micro-batch of three sequences has one
        ({"pp": 2}, {"pp": 2, "schedule": "1F1B"}),
        ({"pp": 2}, {"pp": 2, "schedule": "DualPipe", "recompute": "full"}),
    ],
    ids=["ep", "fsdp", "1F1B", "DualPipe"],
)
def test_the_record_of_a_steps_routing_does_not_tell_the_layout(world2, tmp_path, text, layout, spread):
    short = {"tokens": str(3 * 6 * 32), "micro_batch_size": 1, "eval_every": 99, "save_every": 99, "router_every": 2}
    alone = whole_run(settings(tmp_path / "alone", text, **short, sample_tokens=0)).run.path
    config = settings(tmp_path / "run", text, **{**short, **spread}, sample_tokens=0)
    world2.run(run_together, layout=layout, config=config)
    (ours,), (theirs,) = map(router_records, (tmp_path / "run", alone))
    assert ours.name == theirs.name and ours.stat().st_size == theirs.stat().st_size
    a, b = map(read_router_record, (ours, theirs))
    assert a.step == b.step == 2 and torch.equal(a.tokens_BS, b.tokens_BS) and a.tokens_BS.any(1).all()
    assert list(a.expert_ids) == list(b.expert_ids) == ["layers.1", "layers.2", "mtp.0"]
    for layer, ids in b.expert_ids.items():
        same = a.expert_ids[layer] == ids  # but for the rounding of the step before
        assert same.float().mean() > 0.99, layer
        torch.testing.assert_close(a.weights[layer][same], b.weights[layer][same], rtol=0, atol=5e-3)


def test_what_the_first_process_refuses_all_refuse(world2, tmp_path):
    config = settings(tmp_path / "run", tmp_path / "nowhere")
    messages = world2.run(failing_start, layout={"dp_shard": 2}, config=config)
    assert "nowhere" in messages[0] and messages[0] == messages[1]
