"""`dsv3 demo`: the main job from end to end, in minutes, on whatever machine this is."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from dsv3.serve.engine_config import EngineConfig
from dsv3.serve.load import load_model
from dsv3.serve.params import SamplingParams
from dsv3.serve.text import engine_for
from dsv3.train.config import Device, TrainConfig
from dsv3.train.display import TrainDisplay
from dsv3.train.figures import draw_run
from dsv3.train.run import Run
from dsv3.train.trainer import Trainer, resume_run, start_run

_NEW_TOKENS = 160


def run_demo(out: Path, *, minutes: float, data: str, prompt: str, device: Device) -> None:
    """Train `nano` for about `minutes` (or go on with, or only show, the run in `out`), then generate."""
    console = Console()
    if (out / "train.json").exists():
        trainer = resume_run(out)
        console.print(f"going on with the run in {out} at step {trainer.step} (remove the folder to start anew)")
    else:
        trainer = _start(out, minutes, data, device)
    config, model_config = trainer.config, trainer.model.config
    console.print(
        f"nano: {sum(p.numel() for p in trainer.model.parameters()):,} parameters, "
        f"{model_config.num_hidden_layers} layers ({model_config.first_k_dense_replace} dense), "
        f"{model_config.n_routed_experts} experts of which {model_config.num_experts_per_tok} per token, "
        f"{model_config.num_nextn_predict_layers} MTP module; {config.dtype} on {config.device}"
    )
    if trainer.step < trainer.total_steps:
        with TrainDisplay(trainer.total_steps, start_step=trainer.step) as display:
            trainer.fit(display)
        if trainer.step < trainer.total_steps:
            return
    _show_results(console, trainer.run, prompt)


def _start(out: Path, minutes: float, data: str, device: Device) -> Trainer:
    """A new run whose number of steps fits the time: the first few are timed on a trainer that is thrown away."""
    console = Console()
    # A run of a few hundred steps has no time for the report's gamma of 0.001; a tenfold one settles, then eases off.
    gamma = "0.01, hold 60%, linear 0.001 40%"
    settings = TrainConfig(out=out, data=data, device=device, eval_tokens=32768, bias_update_speed=gamma)
    probe = start_run(settings, console.print)
    console.print("timing a few steps ...")
    steps = max(20, int(minutes * 60 / _seconds_per_step(probe)))
    quarter = max(steps // 4, 1)
    tokens = steps * probe.timetable[0].tokens
    config = dataclasses.replace(probe.config, tokens=str(tokens), eval_every=quarter, save_every=quarter)
    probe.run.save_settings(config)
    return Trainer(probe.run, config, probe.model.config, probe.data)


def _seconds_per_step(trainer: Trainer) -> float:
    seconds = [float(trainer.train_step()["seconds"]) for _ in range(6)]
    return statistics.median(seconds[1:])


def _show_results(console: Console, run: Run, prompt: str) -> None:
    records = run.records()
    evaluations = [record for record in records if "bits_per_byte" in record]
    first, last = evaluations[0], evaluations[-1]
    console.print(
        f"\nheld-out bits per byte: [bold]{first['bits_per_byte']:.3f}[/] before training, "
        f"[bold]{last['bits_per_byte']:.3f}[/] after {last['step']} steps"
    )
    # FP32: in BF16 two nearly equal logits may change places with the number of tokens in a pass.
    device = torch.device(run.settings().device)
    model, tokenizer = load_model(run.path, device=device, dtype=torch.float32)
    table = Table(show_edge=False)
    for column in ("decoding", "tokens/s", "passes of the main model", "drafts accepted"):
        table.add_column(column, justify="right" if column != "decoding" else "left")
    texts = []
    params = SamplingParams(max_tokens=_NEW_TOKENS)
    for name, draft_tokens in (("plain", 0), ("MTP speculative", None)):
        settings = EngineConfig(draft_tokens=draft_tokens, adaptive_drafting=False)
        for _ in ("to warm up", "to measure"):
            engine = engine_for(model, tokenizer, prompt, params, settings)
            text = "".join(output.text for output in engine.stream(prompt, params))
        metrics = engine.metrics
        texts.append(text)
        table.add_row(
            name,
            f"{metrics.tokens_per_second:.0f}",
            f"{metrics.steps} for {metrics.output_tokens} tokens",
            f"{metrics.acceptance:.0%}" if metrics.drafted else "",
        )
    console.print(
        Panel(prompt + texts[0], title="greedy continuation", title_align="left"), markup=False, highlight=False
    )
    console.print(table)
    same = (
        "the same text, token for token"
        if texts[0] == texts[1]
        else "DIFFERENT texts: this is a defect, please report it"
    )
    console.print(f"plain and speculative gave {same}")
    for path in draw_run(records, run.figures):
        console.print(f"figure: {path}", highlight=False, soft_wrap=True)
    console.print(
        f"generate more: dsv3 generate {run.path} --prompt 'import ' --speculative", highlight=False, soft_wrap=True
    )
