"""`dsv3 data`: prepare text for training once, and say what a prepared folder holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from dsv3.data.config import DataConfig

_DEFAULTS = DataConfig()


def prepare(
    sources: Annotated[str, tyro.conf.Positional],
    out: Path,
    vocab_size: int = 4096,
    tokenizer: Path | None = None,
    config: Annotated[DataConfig, tyro.conf.arg(name="")] = _DEFAULTS,
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Tokenise sources into memory-mapped shards; called again, it goes on where it was stopped.

    Args:
        sources: One source, or several as 'WEIGHT:NAME WEIGHT:NAME ...'; a name is 'stdlib', a file, a folder, a
            pattern or 'hf:NAME' (docs/data.md).
        out: The folder of shards, for `dsv3 train --data`.
        vocab_size: Of the tokenizer that is trained on the text.
        tokenizer: A folder with a tokenizer.json to use instead of a new one.
        quiet: Print nothing but errors.
    """
    from dsv3.data.display import PrepareDisplay
    from dsv3.data.prepare import prepare as run
    from dsv3.data.tokenizer import Tokenizer

    encoder = vocab_size if tokenizer is None else Tokenizer.load(tokenizer)
    with PrepareDisplay(quiet=quiet) as display:
        run(sources, out, encoder, config, report=display.report, advance=display.advance)


def inspect(
    folder: Annotated[Path, tyro.conf.Positional],
    as_json: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json")] = False,
) -> None:
    """What a folder of prepared data holds: sources, documents, tokens, tokenizer, settings.

    Args:
        folder: What `dsv3 data prepare` wrote, or a run's `data`.
        as_json: Print one JSON object, for machines.
    """
    from dsv3.data.prepared import describe

    report = describe(folder)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        Console().print(report)


COMMANDS: dict[str, Callable[..., None]] = {"prepare": prepare, "inspect": inspect}
