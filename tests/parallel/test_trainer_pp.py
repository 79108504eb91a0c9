"""A run over a pipeline is the run of one process: its records, its checkpoints, and going on under any layout."""

import json
import shutil

import pytest
import torch

from dsv3.cli import main
from dsv3.errors import UserError
from dsv3.parallel.ranks import Ranks
from dsv3.train.run import Run
from dsv3.train.trainer import check_settings, resume_run, start_run
from tests.parallel.test_trainer import assert_same_checkpoint, forget_after, tensors, text  # noqa: F401
from tests.parallel.trainer_cases import Silent, settings, whole_run
from tests.parallel.world import mesh_of

STEPS = 20
ALIKE = ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio", "bits_per_byte", "ema_bits_per_byte")
SPREADS = {
    "1F1B": {"pp": 2, "schedule": "1F1B", "layout": "Et|ttmL", "timeline_steps": (2,)},
    "DualPipe": {"pp": 2, "schedule": "DualPipe", "timeline_steps": (2, 3)},
}


class Noting(Silent):
    def __init__(self):
        self.messages = []

    def log(self, message):
        self.messages.append(message)


def pp_settings(out, text, **changes):  # noqa: F811
    return settings(
        out,
        text,
        **{
            "tokens": str(STEPS * 8 * 16),
            "seq_len": 16,
            "batch_size": "8",
            "save_every": 5,
            "eval_every": 20,
            **changes,
        },
    )


def run_pipeline(config, **axes):
    """What the display was told. axes: beside pp 2."""
    return fitted(start_run(config, lambda message: None, Ranks(mesh_of(pp=2, **axes))))


def resume_pipeline(run, spread, **axes):
    return fitted(resume_run(run, Ranks(mesh_of(pp=2, **axes)), spread))


def fitted(trainer):
    display = Noting()
    trainer.fit(display)
    trainer.execution.pipeline.close()
    return display.messages


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text):  # noqa: F811
    return whole_run(pp_settings(tmp_path_factory.mktemp("alone") / "run", text)).run


def assert_same_records(run, alone):
    ours, theirs = run.records(), alone.records()
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() - {"sample"} == b.keys() - {"sample"}
        for key in ALIKE:
            if key in b:
                assert a[key] == pytest.approx(b[key], rel=2e-3), (a["step"], key)
        if "load" in b:
            assert list(a["load"]) == list(b["load"])
            for name, load in b["load"].items():
                assert a["load"][name] == pytest.approx(load, abs=0.05), (a["step"], name)


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_the_run_of_a_pipeline_is_that_of_one_process(world2, tmp_path, text, alone, spread, capsys):  # noqa: F811
    messages = world2.run(run_pipeline, config=pp_settings(tmp_path / "run", text, **spread))
    assert "no samples" in messages[0][0]
    run = Run(tmp_path / "run")
    assert_same_records(run, alone)
    assert_same_checkpoint(run.checkpoints()[0], alone.checkpoints()[0], tolerance=2e-3)
    main(["plot", "--timeline", str(run.path), "--step", "2"])
    figure, trace = (run.path / "timeline" / f"step-00000002.{kind}" for kind in ("png", "trace.json"))
    assert str(figure) in capsys.readouterr().out and figure.read_bytes().startswith(b"\x89PNG")
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {event["tid"] for event in events} == {0, 1}

    # Under one layout a run that was interrupted is, bit for bit, the run that was not.
    records, last = [record.get("loss") for record in run.records()], tensors(run.checkpoints()[-1])
    forget_after(run, 15)
    world2.run(resume_pipeline, run=run.path, spread=None)
    assert [record.get("loss") for record in run.records()] == records
    again = tensors(run.checkpoints()[-1])
    assert again.keys() == last.keys() and all(torch.equal(value, last[name]) for name, value in again.items())


def test_a_run_goes_from_a_pipeline_to_one_process_and_on_to_another_pipeline(world2, tmp_path, alone):
    """One process to step 5, 1F1B to 10, one process to 15, DualPipe to 20: each reads what the one before wrote, and
    all steps are those of the run that was never moved."""
    run = Run(tmp_path / "run")
    shutil.copytree(alone.path, run.path)
    for step, spread in ((5, SPREADS["1F1B"]), (10, None), (15, SPREADS["DualPipe"])):
        forget_after(run, step)
        if spread is None:
            resume_run(run.path).fit(Silent())
        else:
            world2.run(resume_pipeline, run=run.path, spread=spread)
        assert_same_records(run, alone)
        ours, theirs = (next(c for c in r.checkpoints() if c.name.endswith(f"{step + 5}")) for r in (run, alone))
        assert_same_checkpoint(ours, theirs, tolerance=5e-3)


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_loading_changes_nothing(world2, tmp_path, alone, spread):
    """What a pipeline reads and writes again at once are the same tensors, moments and averages too, bit for bit."""
    run = Run(tmp_path / "run")
    shutil.copytree(alone.path, run.path)
    shutil.move(run.checkpoints()[-1], tmp_path / "before")
    shutil.copytree(tmp_path / "before", run.path / "checkpoints" / "step-00000020")
    world2.run(save_again, run=run.path, spread=spread)
    assert_same_checkpoint(run.checkpoints()[-1], tmp_path / "before", tolerance=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [{**SPREADS["1F1B"]}, {**SPREADS["DualPipe"], "overlap": True}], ids=SPREADS)
def test_two_pipelines_that_share_experts_are_one_process(world4, tmp_path, text, spread):  # noqa: F811
    """Pipeline x data x expert parallelism; with 1F1B the first stage has no experts at all."""
    alone = whole_run(pp_settings(tmp_path / "alone", text, micro_batch_size=1))  # so that rounding is alike
    config = pp_settings(tmp_path / "run", text, ep=2, **{**spread, "micro_batch_size": 1})
    world4.run(run_pipeline, config=config, ep=2)
    assert_same_records(Run(tmp_path / "run"), alone.run)


@pytest.mark.parametrize(
    ("axes", "spread"),
    [
        ({"dp_shard": 2, "ep": 2}, {**SPREADS["DualPipe"], "overlap": True}),
        pytest.param({"dp_shard": 2}, {**SPREADS["DualPipe"], "dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"dp_shard": 2}, {**SPREADS["1F1B"], "recompute": "full"}, marks=pytest.mark.slow),
        pytest.param({"dp_shard": 2}, {"pp": 2, "schedule": "ZBV", "optimizer": "muon"}, marks=pytest.mark.slow),
    ],
    ids=["DualPipe ep", "DualPipe bf16", "1F1B full", "ZBV muon"],
)
def test_pipelines_that_share_parameters_are_one_process(world4, tmp_path, text, axes, spread):  # noqa: F811
    """Records, checkpoints, going on from one bit for bit, and going on from it in one process."""
    one = {name: value for name, value in spread.items() if name in ("dtype", "optimizer")}
    short = {"micro_batch_size": 1, "tokens": str(4 * 8 * 16), "save_every": 2, "eval_every": 4}
    alone = whole_run(pp_settings(tmp_path / "alone", text, **one, **short)).run
    world4.run(run_pipeline, config=pp_settings(tmp_path / "run", text, **axes, **{**spread, **short}), **axes)
    run = Run(tmp_path / "run")
    if "dtype" in spread:  # these drift apart as they do by any change of order
        ours, theirs = ([r["loss"] for r in r.records() if "loss" in r] for r in (run, alone))
        assert ours == pytest.approx(theirs, rel=1e-2)
    else:
        assert_same_records(run, alone)
        assert_same_checkpoint(run.checkpoints()[0], alone.checkpoints()[0], tolerance=2e-3)
    losses, last = [record.get("loss") for record in run.records()], tensors(run.checkpoints()[-1])
    forget_after(run, 2)
    world4.run(resume_pipeline, run=run.path, spread=None, **axes)
    assert [record.get("loss") for record in run.records()] == losses
    again = tensors(run.checkpoints()[-1])
    assert again.keys() == last.keys() and all(torch.equal(value, last[name]) for name, value in again.items())
    forget_after(run, 2)
    resume_run(
        run.path, spread={"pp": 1, "dp_shard": 1, "ep": 1, "overlap": False, "layout": None, "timeline_steps": ()}
    ).fit(Silent())
    if "dtype" not in spread:
        assert_same_records(run, alone)


def save_again(run, spread):
    trainer = resume_run(run, Ranks(mesh_of(pp=2)), spread)
    with trainer.saver:
        trainer.save()
    trainer.execution.pipeline.close()


def spoiled_steps(config):
    """A step with a broken output of a layer of the second stage, then one with a broken gradient there."""
    trainer = start_run(config, lambda message: None, Ranks(mesh_of(pp=2)))
    model = trainer.model
    break_output = model.layers["2"].self_attn.register_forward_hook if "2" in model.layers else None
    handle = break_output(lambda module, args, output: output * float("nan")) if break_output else None
    reasons = [trainer.train_step()["skipped"]]
    if handle is not None:
        handle.remove()
        weight = model.layers["2"].mlp.router.weight
        handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    reasons.append(trainer.train_step()["skipped"])
    if handle is not None:
        handle.remove()
    assert "loss" in trainer.train_step()
    trainer.execution.pipeline.close()
    return reasons


def test_the_diagnosis_of_a_step_that_is_not_finite_names_place_and_stage(world2, tmp_path, text):  # noqa: F811
    config = pp_settings(tmp_path / "run", text, **SPREADS["1F1B"])
    reasons = world2.run(spoiled_steps, config=config)
    assert reasons[0] == reasons[1]
    assert "output of layers.2.self_attn on rank 1, pipeline stage 1" in reasons[0][0]
    assert "gradient of layers." in reasons[0][1] and "pipeline stage" in reasons[0][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pp": 2, "dp_shard": 2}, "8 sequences, which has 2 micro-batches"),
        ({"layout": "Ettt|mL"}, "'layout' is 'Ettt|mL', expected nothing without a pipeline"),
        ({"timeline_steps": (1,)}, "'timeline_steps'"),
        ({"pp": 2, "timeline_steps": (0,)}, "'timeline_steps'"),
        ({"pp": 2, "schedule": "ZBV", "overlap": True}, "'overlap' is True, expected False with ZBV"),
        ({"pp": 2, "schedule": "1F1B", "layout": "Ettt|L"}, "0 MTP modules"),
        ({"pp": 2, "schedule": "1F1B", "layout": "Et|t|tmL"}, "3 stages, expected a multiple of the 2"),
        ({"pp": 2, "schedule": "GPipe"}, "no pipeline schedule 'GPipe'"),
        ({"pp": 3}, "even number of ranks"),
        ({"pp": 2, "micro_batch_size": 3, "batch_size": "9"}, "9 sequences, which has 3 micro-batches"),
        ({"pp": 2, "micro_batch_size": None}, "which has 1 micro-batches"),
        ({"pp": 2, "dp_replicate": 2}, "8 sequences, which has 2 micro-batches"),
        ({"pp": 8, "schedule": "1F1B"}, "8 pipeline stages cannot be filled"),
    ],
)
def test_what_does_not_go_together_is_refused_before_data_is_read(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        check_settings(pp_settings(tmp_path / "run", tmp_path, **changes))
