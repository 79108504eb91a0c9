"""The `dsv3` command: one subcommand, one function call.

What a command needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dsv3.errors import UserError
from dsv3.train.config import Device, DType, TrainConfig

_DEFAULTS = TrainConfig()

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
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Train a model on text; the result is a run folder whose checkpoints are Hugging Face folders.

    Args:
        resume: A run's folder: go on from its newest checkpoint, with its own settings (all other options are refused).
        quiet: Print nothing but errors.
    """
    from dsv3.train.display import TrainDisplay
    from dsv3.train.figures import draw_run
    from dsv3.train.trainer import resume_run, start_run

    if resume is not None and config != _DEFAULTS:
        raise UserError(f"--resume takes all settings from the run in {resume}: leave the other options out")
    report = (lambda message: None) if quiet else print
    trainer = start_run(config, report) if resume is None else resume_run(resume)
    with TrainDisplay(trainer.total_steps, start_step=trainer.step, quiet=quiet) as display:
        trainer.fit(display)
    for path in draw_run(trainer.run.records(), trainer.run.figures):
        if not quiet:
            print(f"figure: {path}")
    if not quiet:
        print(f"run: {trainer.run.path}   generate from it: dsv3 generate {trainer.run.path} --prompt '...'")


def generate(
    model: Annotated[Path, tyro.conf.Positional],
    prompt: str = "",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    speculative: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: Annotated[Json, tyro.conf.arg(name="json")] = False,
) -> None:
    """Continue a prompt with a trained model.

    Args:
        model: A run's folder (its newest checkpoint is taken) or a checkpoint folder with a tokenizer.
        prompt: Text to continue; '-' reads it from standard input, empty starts a new document.
        max_new_tokens: Stop after so many tokens, if the text has not ended before.
        temperature: 0 takes the likeliest token each time; 1 samples as the model learned.
        top_p: Sample among the likeliest tokens that together have this much probability.
        seed: Of the sampling; the same seed gives the same text.
        speculative: Draft with the MTP modules; the same distribution in fewer passes.
        device: Where to run.
        dtype: Of the weights; auto keeps the checkpoint's.
    """
    from dsv3.device import pick_device, pick_dtype
    from dsv3.serve.generate import GenerationStats
    from dsv3.serve.load import load_model
    from dsv3.serve.sampling import SamplingParams
    from dsv3.serve.text import continue_text

    text = sys.stdin.read() if prompt == "-" else prompt
    params = SamplingParams(temperature, top_p, seed)
    where = pick_device(device)
    loaded, tokenizer = load_model(model, device=where, dtype=None if dtype == "auto" else pick_dtype(dtype, where))
    stats = GenerationStats()
    pieces = continue_text(
        loaded,
        tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        params=params,
        speculative=speculative,
        stats=stats,
    )
    if as_json:
        print(json.dumps({"prompt": text, "text": "".join(pieces), **stats.to_json()}, ensure_ascii=False))
        return
    print(text, end="")
    for piece in pieces:
        print(piece, end="", flush=True)
    drafts = f", {stats.acceptance:.0%} of the drafts accepted" if speculative else ""
    print(f"\n[{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s{drafts}]", file=sys.stderr)


def inspect(
    target: Annotated[str, tyro.conf.Positional],
    as_json: Annotated[Json, tyro.conf.arg(name="json")] = False,
) -> None:
    """What is in a model: a preset's numbers, or a checkpoint's tensors, without loading either.

    Args:
        target: A preset (see below), a run's folder, or a checkpoint folder. Presets: nano, micro, bench, bench-576,
            v3-16b, v3-236b, v3-671b.
    """
    from dsv3.inspect import inspect_target, print_inspection

    report = inspect_target(target)
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
    "generate": generate,
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
