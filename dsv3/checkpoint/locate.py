"""Where checkpoints lie: a folder given by a user may be one, or a run that has some."""

from __future__ import annotations

import re
from pathlib import Path

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
