"""What a user means by a model: a preset's name, a config.json, a checkpoint folder, or a run that has checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

from dsv3.config import PRESETS, ModelConfig
from dsv3.errors import UserError

_STEP = re.compile(r"step-(\d{8})")


def step_folder(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def run_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if _STEP.fullmatch(path.name))


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint folder, else the newest one of the run in it; `UserError` if neither."""
    if any(path.glob("*.safetensors")):
        return path
    checkpoints = run_checkpoints(path)
    if not checkpoints:
        raise UserError(f"{path} is neither a checkpoint (no .safetensors) nor a run that has one (no checkpoints/)")
    return checkpoints[-1]


def resolve_config(name: str) -> ModelConfig:
    """A preset's config, or that of a config.json or a folder with one. Raises `UserError` if it is neither."""
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).exists():
        from dsv3.checkpoint.hf_config import load_config  # needs torch, which a preset's reader need not wait for

        return load_config(name)
    raise UserError(f"'{name}' is neither a preset ({', '.join(PRESETS)}) nor a config.json that exists")
