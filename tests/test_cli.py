"""The command as a user meets it: help that reads, JSON that parses, one sentence and exit code 2 for bad input."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.hf_config import config_to_hf
from dsv3.cli import COMMANDS, main
from dsv3.cli_plan import COMMANDS as PLAN_COMMANDS
from dsv3.config import ModelConfig
from dsv3.ops.packed import can_pack
from dsv3.ops.quantized import Int8Weight


def run(capsys, *args: str) -> str:
    main(list(args))
    return capsys.readouterr().out


def refused(capsys, *args: str) -> str:
    """The one line that the command answers."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.startswith("dsv3: ") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(f"the {i}th line says {i * i} and {i % 7}" for i in range(2000)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus) -> Path:
    """A run of a dozen steps, made by the command itself."""
    out = tmp_path_factory.mktemp("trained") / "run"
    options = (
        "--model micro --tokens 1536 --batch-size 4 --seq-len 32 --eval-tokens 256 --device cpu --dtype float32 --quiet"
    )
    main(["train", "--out", str(out), "--data", str(corpus), *options.split()])
    return out


@pytest.mark.parametrize("command", [*COMMANDS])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: dsv3 {command}" in out and "Args:" not in out


@pytest.mark.parametrize("command", [*PLAN_COMMANDS])
def test_every_plan_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", command, "--help"])
    assert stop.value.code == 0 and f"usage: dsv3 plan {command}" in capsys.readouterr().out


def test_the_released_models_numbers(capsys):
    """Section 7 of the facts, each from the model built on the meta device."""
    report = json.loads(run(capsys, "inspect", "v3-671b", "--json"))
    parameters, experts, cost = report["parameters"], report["experts"], report["training_cost"]
    assert parameters["total"] == 671_026_419_200
    assert parameters["activated_without_embedding_and_head"] == 35_698_939_392
    assert parameters["activated_with_head"] == 36_625_618_432
    assert parameters["activated"] == 37_552_297_472
    assert parameters["mtp"] == 11_610_068_224
    assert parameters["mla_per_layer"] == 187_107_328
    assert (experts["moe_layers"], experts["per_layer"], experts["total"]) == (58, 257, 14_906)
    assert (experts["active_per_layer"], experts["active_total"]) == (9, 522)
    assert report["kv_cache"]["bytes_per_token_bf16"] == 70_272
    assert report["kv_cache"]["values_per_token_and_layer_of_mha"] == 32_768
    assert [round(stage["gpu_hours"]) for stage in cost["stages"]] == [2_664_000, 119_000, 5_000]
    assert [round(stage["dollars"]) for stage in cost["stages"]] == [5_328_000, 238_000, 10_000]
    assert round(cost["gpu_hours"]) == 2_788_000 and round(cost["dollars"]) == 5_576_000
    assert round(cost["gpu_hours_per_trillion"]) == 180_000
    assert round(cost["days_per_trillion"], 1) == 3.7 and cost["gpus"] == 2048


def test_a_presets_numbers_read_well(capsys):
    assert "671,026,419,200" in run(capsys, "inspect", "v3-671b")


def test_training_draws_and_generation_reads(trained, capsys):
    assert {path.name for path in (trained / "figures").iterdir()} == {"training.png", "expert_load.png"}
    answers = []
    for extra in ([], ["--speculative"]):
        out = run(capsys, "generate", str(trained), "--prompt", "the 7", "--max-new-tokens", "24", "--json", *extra)
        answers.append(json.loads(out))
    assert answers[0]["text"] == answers[1]["text"]
    assert answers[1]["steps"] <= answers[0]["steps"] and answers[1]["drafted"] and not answers[0]["drafted"]
    assert answers[0]["tokens_per_second"] > 0 and answers[0]["cache_blocks"] < 10  # no more cache than it needs


def test_a_file_of_prompts_gets_the_texts_that_each_gets_alone(trained, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the {n}", "n": n}) + "\n" for n in range(5)))
    args = ["generate", str(trained), "--max-new-tokens", "9", "--json"]
    report = json.loads(run(capsys, *args, "--prompts", str(prompts), "--out", str(out), "--speculative"))
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["n"] for line in lines] == list(range(5)) and report["output_tokens"] <= 45
    for line in lines[:2]:
        assert json.loads(run(capsys, *args, "--prompt", line["prompt"]))["text"] == line["text"]


def test_a_run_is_extended_and_the_same_command_again_only_measures(trained, tmp_path, capsys):
    options = "--lengths 256 --trained-length 128 --steps 2 --tokens-per-step 512 --trials 1 --eval-tokens 512"
    args = ["extend", str(trained), "--out", str(tmp_path), *options.split(), "--device", "cpu", "--json"]
    report = json.loads(run(capsys, *args))
    assert list(report) == ["before (128)", "YaRN, not trained", "phase 256"]
    assert report["phase 256"]["needle"]["lengths"] == [128, 256]
    assert json.loads(run(capsys, *args)) == report
    assert run(capsys, *args[:-1], "--quiet") == ""
    assert (tmp_path / "extension.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(run(capsys, "inspect", str(tmp_path / "phase-256"), "--json"))
    assert report["missing"] == report["unexpected"] == []


def test_training_goes_on_from_a_checkpoint(trained, corpus, tmp_path, capsys):
    options = "--tokens 256 --batch-size 4 --seq-len 32 --eval-tokens 256 --sample-tokens 0 --learning-rate 0"
    args = ["--data", str(corpus), "--bias-update-speed", "0", "--device", "cpu", "--dtype", "float32", "--quiet"]
    run(capsys, "train", "--init", str(trained), "--out", str(tmp_path / "run"), *options.split(), *args)
    answers = [
        run(capsys, "generate", str(folder), "--prompt", "the 7", "--json") for folder in (trained, tmp_path / "run")
    ]
    texts = [json.loads(answer)["text"] for answer in answers]
    assert texts[0] == texts[1]


def test_inspecting_and_converting_a_run(trained, tmp_path, capsys):
    report = json.loads(run(capsys, "inspect", str(trained), "--json"))
    assert report["missing"] == report["unexpected"] == [] and set(report["dtypes"]) == {"F32"}
    target = str(tmp_path / "bf16")
    report = json.loads(run(capsys, "convert", str(trained), target, "--dtype", "bfloat16", "--verify", "--json"))
    assert 0 < report["kl"]["main"]["kl_mean"] < 1e-2
    text = json.loads(run(capsys, "generate", target, "--prompt", "the", "--max-new-tokens", "3", "--json"))["text"]
    assert text


@pytest.mark.skipif(
    not (can_pack(torch.empty(0, dtype=torch.bfloat16)) and Int8Weight.available()),
    reason="this CPU or this torch has no kernel for int8 weights",
)
def test_a_run_quantised(trained, corpus, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(corpus.read_text()[:2000])
    options = ("inspect", str(trained), "--quantize", "int8", "--text", str(text))
    report = json.loads(run(capsys, *options, "--json"))
    assert report["quantization"] == "int8" and 0 < report["kl_mean"] < 1e-2
    assert f"{report['quantized_perplexity']:.4f}" in run(capsys, *options)
    answer = run(capsys, "generate", str(trained), "--quantize", "int8", "--max-new-tokens", "3", "--json")
    assert json.loads(answer)["output_tokens"] <= 3
    assert "float32" in refused(capsys, "generate", str(trained), "--quantize", "int8", "--dtype", "float32")


def test_a_conversion_shows_how_far_it_is_apart_from_its_report(trained, tmp_path, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for terminal, shows in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("FORCE_COLOR", "1")
        main(["convert", str(trained), str(tmp_path / str(shows)), "--dtype", "bfloat16", "--json"])
        assert ("MB" in terminal.getvalue()) == shows
        assert "target" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "args",
    [
        "plan model v3-671b",
        "plan memory nano --micro-batch 16 --sequence-length 256",
        "plan fit nano --gpus 1 --batch-size 16",
        "plan comm v3-671b",
        "plan cost v3-671b --tokens 14.8e12 --gpus 2048 --mfu 0.4",
        "plan serve v3-671b --input-tokens-per-second 1e6 --output-tokens-per-second 2e5",
        "plan pipeline --ranks 4 --chunks 8",
    ],
)
def test_plans_as_tables_and_as_json(args, capsys):
    assert run(capsys, *args.split())
    assert json.loads(run(capsys, *args.split(), "--json"))


def test_data_is_prepared_once_and_trained_on_in_place(corpus, tmp_path, capsys):
    folder = tmp_path / "prepared"
    run(capsys, "data", "prepare", str(corpus), "--out", str(folder), "--vocab-size", "300", "--quiet")
    report = json.loads(run(capsys, "data", "inspect", str(folder), "--json"))
    assert report["complete"] and report["sources"]
    options = "--model micro --tokens 256 --batch-size 4 --seq-len 32 --eval-tokens 256 --device cpu --quiet"
    run(capsys, "train", "--out", str(tmp_path / "run"), "--data", str(folder), *options.split())
    assert (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "data").exists()


def test_runs_are_plotted_and_compared(trained, tmp_path, capsys):
    report = json.loads(run(capsys, "plot", str(trained), "--out", str(tmp_path / "one"), "--json"))
    assert [Path(figure).name for figure in report["figures"]] == ["training.png", "expert_load.png"]
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    out = run(capsys, "plot", str(trained), str(other), "--out", str(tmp_path / "two"))
    assert "training.png" in out and "expert_load-other.png" in out
    assert all(Path(line.removeprefix("figure: ")).is_file() for line in out.splitlines())


def test_a_dry_run_can_be_followed_by_the_run(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["train", "--out", str(out), "--data", str(corpus)]
    args += "--model micro --tokens 256 --batch-size 4 --seq-len 32 --eval-tokens 256 --device cpu --quiet".split()
    text = run(capsys, *args, "--dry-run")
    assert "optimizer steps" in text and str(out / "figures" / "schedules.png") in text
    assert [path.name for path in out.rglob("*")] == ["figures", "schedules.png"]
    run(capsys, *args)
    assert (out / "checkpoints").is_dir()
    assert "already a run" in refused(capsys, *args, "--dry-run")


def test_domains_are_measured(corpus, tmp_path, capsys):
    for name in ("verse", "prose"):
        (tmp_path / f"{name}.txt").write_text(f"some {name} to measure\n" * 60)
    args = ["train", "--out", str(tmp_path / "run"), "--data", str(corpus), "--eval-data"]
    args += [str(tmp_path / "verse.txt"), str(tmp_path / "prose.txt"), "--isolate", "--sample-tokens", "0"]
    args += "--model micro --tokens 256 --batch-size 4 --seq-len 32 --eval-tokens 256 --device cpu".split()
    out = run(capsys, *args)
    assert "by domain verse" in out and "sample:" not in out
    assert (tmp_path / "run" / "figures" / "domains.png").is_file()


def test_plan_placement_reads_a_run(trained, capsys):
    args = ["plan", "placement", str(trained), "--replicas", "12", "--gpus", "4"]
    assert json.loads(run(capsys, *args, "--json"))


def test_plan_pipeline_draws(tmp_path, capsys):
    figure, trace = tmp_path / "schedule.png", tmp_path / "trace.json"
    run(capsys, "plan", "pipeline", "--ranks", "4", "--chunks", "8", "--figure", str(figure), "--trace", str(trace))
    assert figure.read_bytes().startswith(b"\x89PNG") and json.loads(trace.read_text())


@pytest.fixture
def bad_files(tmp_path) -> Path:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(b"\x00\x01\x02" * 100)
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": "broken\n')
    (tmp_path / "wrong.jsonl").write_text('{"text": "fine"}\n{"words": 3}\n')
    (tmp_path / "folder").mkdir()
    config = config_to_hf(ModelConfig.preset("micro"), dtype=torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": -4}))
    return tmp_path


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("train --out {dir}/run --data {dir}/nothing", "nothing"),
        ("train --out {dir}/run --data {dir}/empty.txt", "empty"),
        ("train --out {dir}/run --data {dir}/binary.bin", "binary.bin"),
        ("train --out {dir}/run --data {dir}/folder", "folder"),
        ("train --out {dir}/run --data {dir}/broken.jsonl", "broken.jsonl"),
        ("train --out {dir}/run --data {dir}/wrong.jsonl", "wrong.jsonl"),
        ("train --out {dir}/run --model colossal", "colossal"),
        ("train --out {dir}/run --model {dir}/config.json", "hidden_size"),
        ("train --out {dir}/run --tokens many", "tokens"),
        ("train --out {dir}/run --learning-rate up", "learning_rate"),
        ("train --out {dir}/run --init {dir}/folder", "neither a checkpoint"),
        ("train --resume {dir}", "no run in"),
        ("train --resume {dir} --seed 3", "leave the other options out"),
        ("train --resume {dir} --dry-run", "yet to begin"),
        ("train --out {dir}/run --fim-rate 2", "fim_rate"),
        ("train --out {dir}/run --dry-run --data {dir}/nothing", "nothing"),
        ("train --out {dir}/run --dry-run --bias-update-speed fast", "bias_update_speed"),
        ("plot {dir}", "no run in"),
        ("extend {dir}/folder --out {dir}/out", "neither a checkpoint"),
        ("extend {dir}/folder --out {dir}/out --lengths 4096 1024", "lengths"),
        ("generate {dir} --prompt a", "neither a checkpoint"),
        ("inspect {dir}/nothing", "neither a preset"),
        ("inspect {dir}/folder", "neither a checkpoint"),
        ("inspect {dir}/folder --quantize int8", "--text"),
        ("inspect nano --quantize int8 --text {dir}/broken.jsonl", "a preset"),
        ("inspect {dir}/folder --quantize int8 --text {dir}/nothing", "cannot read the text"),
        ("convert {dir}/folder {dir}/out", "neither a checkpoint"),
        ("plan model colossal", "colossal"),
        ("plan pipeline --ranks 0 --chunks 4", "rank"),
        ("plan fit nano --gpus 1 --batch-size 16 --gpu Abacus", "Abacus"),
        ("plan placement {dir}/nothing.json --replicas 8 --gpus 2", "nothing.json"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(args, says, bad_files, capsys):
    assert says in refused(capsys, *args.format(dir=bad_files).split())
    assert not (bad_files / "out").exists()


def test_a_broken_line_is_named_by_its_number(bad_files, capsys):
    for name in ("broken", "wrong"):
        message = refused(capsys, "train", "--out", f"{bad_files}/run", "--data", f"{bad_files}/{name}.jsonl")
        assert "2" in message.split("jsonl", 1)[1]


@pytest.mark.parametrize("args", ["train --steps 3", "frobnicate", "plot", "generate", "plan", "train --seed x"])
def test_unknown_or_missing_options_exit_with_2(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args.split())
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err
