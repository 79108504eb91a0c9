"""The `dsv3` command: one subcommand, one function call.

What a command needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dsv3.cli_serve import chat, serve
from dsv3.errors import UserError
from dsv3.serve.engine_config import Quantization
from dsv3.train.config import Device, DType, TrainConfig
from dsv3.train.extend_config import ExtendConfig

_DEFAULTS = TrainConfig()
_EXTEND_DEFAULTS = ExtendConfig()

Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Print JSON, for machines.")]


def demo(
    out: Path = Path("out/demo"),
    minutes: float = 4.0,
    data: str = "stdlib",
    prompt: str = "def read_lines(path):\n",
    device: Device = "auto",
) -> None:
    """Train a small DeepSeek-V3 with every part of the architecture on real text, then generate from it.

    Shows held-out bits per byte before and after, a continuation of the prompt with and without MTP speculative
    decoding, and draws expert load over training. Run it again to see the results again, or to go on after a stop.

    Args:
        out: Folder of the run.
        minutes: How long to train; the number of steps is worked out from the speed of the first few.
        data: 'stdlib' (the source of Python's standard library on this machine), or a text file, folder, .jsonl or
            .parquet.
        prompt: What the trained model continues.
        device: Where to run.
    """
    from dsv3.demo import run_demo

    run_demo(out, minutes=minutes, data=data, prompt=prompt, device=device)


def train(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = _DEFAULTS,
    resume: Path | None = None,
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Train a model on text; the result is a run folder whose checkpoints are Hugging Face folders.

    Args:
        resume: A run's folder: go on from its newest checkpoint, with its own settings (other options are refused, but
            for those that say how it is spread over processes: --dp-replicate to --timeline-steps, and --comm-timeout).
        dry_run: Check the settings, print what the run comes to and draw its schedules; train nothing.
        quiet: Print nothing but errors.
    """
    if resume is not None and dataclasses.replace(config, **_DEFAULTS.spread) != _DEFAULTS:
        raise UserError(f"--resume takes all settings from the run in {resume}: leave the other options out")
    if dry_run:
        _dry_run(config, resume)
        return
    from dsv3.train.display import TrainDisplay
    from dsv3.train.figures import draw_run
    from dsv3.train.launch import joined, run_to_resume
    from dsv3.train.run import Run
    from dsv3.train.trainer import resume_run, start_run

    resume = resume or run_to_resume(config)
    if resume is not None:
        config = dataclasses.replace(Run.open(resume).settings(), **config.spread)
    with joined(config) as ranks:
        quiet = quiet or not ranks.is_first
        report = (lambda message: None) if quiet else print
        trainer = start_run(config, report, ranks) if resume is None else resume_run(resume, ranks, config.spread)
        with TrainDisplay(trainer.total_steps, start_step=trainer.step, quiet=quiet) as display:
            trainer.fit(display)
    if not ranks.is_first:
        return
    for path in draw_run(trainer.run.records(), trainer.run.figures):
        if not quiet:
            print(f"figure: {path}")
    if not quiet:
        print(f"run: {trainer.run.path}   generate from it: dsv3 generate {trainer.run.path} --prompt '...'")


def _dry_run(config: TrainConfig, resume: Path | None) -> None:
    from rich.console import Console

    from dsv3.train.dry_run import dry_run

    if resume is not None:
        raise UserError(f"--dry-run is for a run that is yet to begin: leave --resume {resume} out")
    summary, figure = dry_run(config)
    Console().print(summary)
    print(f"figure: {figure}")


def plot(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path | None = None,
    timeline: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    step: int | None = None,
    as_json: Annotated[Json, tyro.conf.arg(name="json")] = False,
) -> None:
    """Draw runs to PNG: loss, held-out bits per byte, learning rate, balance, expert load. Several share their axes.

    Args:
        runs: Folders of runs; they may still be going.
        out: Folder of the figures; if left out, a single run's own figures/, or out/plot for several.
        timeline: Draw instead what the ranks of a pipeline did in a step that --timeline-steps recorded, to PNG and as
            a Chrome trace (for Perfetto), into the run's timeline/.
        step: That step; if left out, the last one recorded.
    """
    from dsv3.train.plot import plot_runs, plot_timelines

    if not runs:
        raise UserError("give the folder of a run, or of several to compare")
    if timeline and out is not None:
        raise UserError(f"a timeline is drawn into its run's folder: leave --out {out} out")
    if step is not None and not timeline:
        raise UserError(f"--step {step} says which timeline to draw: add --timeline, or leave it out")
    figures = plot_timelines(runs, step) if timeline else plot_runs(runs, out)
    if as_json:
        print(json.dumps({"figures": [str(path) for path in figures]}))
        return
    for path in figures:
        print(f"figure: {path}")


def extend(
    model: Annotated[Path, tyro.conf.Positional],
    config: Annotated[ExtendConfig, tyro.conf.arg(name="")] = _EXTEND_DEFAULTS,
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    as_json: Annotated[Json, tyro.conf.arg(name="json")] = False,
) -> None:
    """Teach a trained model longer contexts with YaRN, in phases, and measure it before and after each.

    Interrupted, it goes on when it is called again. docs/context.md says what is measured.

    Args:
        model: What to extend: a run's folder (its newest checkpoint is taken) or a checkpoint folder with a tokenizer.
        quiet: Print nothing but errors.
    """
    from rich.console import Console

    from dsv3.train.extend import extend as run
    from dsv3.train.extend import show

    results = run(model, config, quiet=quiet or as_json)
    if results is None:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if as_json:
        print(json.dumps({name: result.to_json() for name, result in results.items()}))
    elif not quiet:
        show(results, Console())
        print(f"figure: {config.out / 'extension.png'}")
        print(f"run: {config.out / f'phase-{config.lengths[-1]}'}   generate from it with `dsv3 generate`")


def generate(
    model: Annotated[Path, tyro.conf.Positional],
    prompt: str = "",
    prompts: Path | None = None,
    out: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    speculative: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    device: Device = "auto",
    dtype: DType = "auto",
    quantize: Quantization = "none",
    as_json: Annotated[Json, tyro.conf.arg(name="json")] = False,
) -> None:
    """Continue a prompt with a trained model.

    Args:
        model: A run's folder (its newest checkpoint is taken) or a checkpoint folder with a tokenizer.
        prompt: Text to continue; '-' reads it from standard input, empty starts a new document.
        prompts: Continue all of a file's prompts instead: JSONL with a text "prompt" in each line, or lines of text.
        out: The JSONL file that gets them with their "text".
        max_new_tokens: Stop after so many tokens, if the text has not ended before.
        temperature: 0 takes the likeliest token each time; 1 samples as the model learned.
        top_p: Sample among the likeliest tokens that together have this much probability.
        seed: Of the sampling; the same seed gives the same text.
        speculative: Draft with the MTP modules; the same distribution in fewer passes.
        device: Where to run.
        dtype: Of the weights; auto keeps the checkpoint's.
        quantize: The weights to fewer bits, on a CPU; `dsv3 inspect --quantize` measures what that costs.
    """
    from dsv3.device import pick_device, pick_dtype
    from dsv3.serve.batch import generate_file
    from dsv3.serve.engine import Engine
    from dsv3.serve.engine_config import EngineConfig
    from dsv3.serve.load import load_model
    from dsv3.serve.params import SamplingParams
    from dsv3.serve.text import engine_for

    if (prompts is None) != (out is None):
        raise UserError("--prompts and --out go together: a file of prompts, and the JSONL file to write")
    if prompts is not None and prompt:
        raise UserError("give either a prompt or a file of prompts, not both")
    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(temperature, top_p, seed, max_tokens=max_new_tokens)
    settings = EngineConfig(draft_tokens=None if speculative else 0)
    where = pick_device(device)
    weights = None if dtype == "auto" else pick_dtype(dtype, where)
    loaded, tokenizer = load_model(model, device=where, dtype=weights, quantization=quantize)
    if prompts is not None and out is not None:
        counters = generate_file(Engine(loaded, tokenizer, settings), prompts, out, params, quiet=as_json)
        print(
            json.dumps({"out": str(out), **counters}) if as_json else f"{out}: {counters['output_tokens']} new tokens"
        )
        return
    engine = engine_for(loaded, tokenizer, text, params, settings)
    if not as_json:
        print(text, end="", flush=True)
    whole = ""
    for output in engine.stream(text, params):
        if output.error is not None:
            raise UserError(f"the text cannot go on: {output.error}")
        whole += output.text
        if not as_json:
            print(output.text, end="", flush=True)
    metrics = engine.metrics
    if as_json:
        print(json.dumps({"prompt": text, "text": whole, **metrics.snapshot()}, ensure_ascii=False))
        return
    drafts = f", {metrics.acceptance:.0%} of the drafts accepted" if speculative else ""
    print(f"\n[{metrics.output_tokens} tokens, {metrics.tokens_per_second:.1f} tokens/s{drafts}]", file=sys.stderr)


def inspect(
    target: Annotated[str, tyro.conf.Positional],
    quantize: Quantization = "none",
    text: Path | None = None,
    as_json: Annotated[Json, tyro.conf.arg(name="json")] = False,
) -> None:
    """What is in a model: a preset's numbers, or a checkpoint's tensors, without loading either.

    With --text: what quantising the model costs on that text, in perplexity and divergence.

    Args:
        target: A preset (see below), a run's folder, or a checkpoint folder. Presets: nano, micro, bench, bench-576,
            v3-16b, v3-236b, v3-671b.
        quantize: The weights to measure, beside those in BF16; none: what packing's rounding alone does.
        text: A text file to measure them on (needs memory for two models).
    """
    from dsv3.inspect import inspect_quantization, inspect_target, print_inspection

    if quantize != "none" and text is None:
        raise UserError(f"--quantize {quantize} is measured on a text: name a file of it with --text")
    report = inspect_target(target) if text is None else inspect_quantization(target, quantize, text)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_inspection(report)


def convert(
    source: Annotated[Path, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    dtype: Literal["keep", "bfloat16", "float32"] = "keep",
    fp8: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    as_json: Annotated[Json, tyro.conf.arg(name="json")] = False,
) -> None:
    """Rewrite a DeepSeek-V3 checkpoint folder in another precision, in pieces of a few megabytes.

    Args:
        source: A checkpoint folder, or a run's folder (its newest checkpoint is taken).
        target: The folder to write; it appears when it is complete.
        dtype: Of what is not FP8; keep leaves each tensor's own (BF16 for FP8 that is unpacked).
        fp8: Write the weights of linear layers as E4M3 in blocks of 128 x 128 with their scales.
        overwrite: Replace a checkpoint that is at the target.
        verify: Load both afterwards and report the KL divergence of their predictions (needs memory for one at a time).
    """
    from dsv3.convert import convert_checkpoint

    convert_checkpoint(source, target, dtype=dtype, fp8=fp8, overwrite=overwrite, verify=verify, as_json=as_json)


def plan() -> None:
    """What a model of any size costs, fits and gains: `dsv3 plan --help` lists the questions. No GPU, no waiting."""


def data() -> None:
    """Prepare text for training once: `dsv3 data --help`. (`dsv3 train` prepares by itself what is not.)"""


COMMANDS: dict[str, Any] = {
    "demo": demo,
    "train": train,
    "extend": extend,
    "plot": plot,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "inspect": inspect,
    "convert": convert,
    "data": data,
    "plan": plan,
}


def main(args: list[str] | None = None) -> None:
    """Run the command line; bad input is one sentence on stderr and exit code 2."""
    args = sys.argv[1:] if args is None else args
    commands, prog, description = COMMANDS, "dsv3", "DeepSeek-V3, whole and small: train it, look into it, plan it."
    if args[:1] in (["plan"], ["data"]):
        group = {"plan": plan, "data": data}[args[0]]
        commands = importlib.import_module(f"dsv3.cli_{args[0]}").COMMANDS
        prog, description, args = f"dsv3 {args[0]}", group.__doc__ or "", args[1:]
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog=prog, description=description, args=args, config=(tyro.conf.OmitArgPrefixes,)
        )
    except UserError as error:
        print(f"dsv3: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has seen enough (`dsv3 inspect ... | head`).
        sys.stderr.close()
        sys.exit(141)
