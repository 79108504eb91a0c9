"""dsv3: the whole DeepSeek-V3 system, readable and checkable.

The names below are the package's front door. They are loaded when first used, so that `dsv3 --help` and the
planner do not wait for a tensor library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3.checkpoint.pretrained import load_pretrained as load_pretrained
    from dsv3.checkpoint.pretrained import save_pretrained as save_pretrained
    from dsv3.config import ModelConfig as ModelConfig
    from dsv3.errors import UserError as UserError
    from dsv3.model.transformer import Transformer as Transformer
    from dsv3.serve.engine import Engine as Engine
    from dsv3.serve.engine_config import EngineConfig as EngineConfig
    from dsv3.serve.params import SamplingParams as SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "dsv3.config",
    "UserError": "dsv3.errors",
    "Transformer": "dsv3.model.transformer",
    "Engine": "dsv3.serve.engine",
    "EngineConfig": "dsv3.serve.engine_config",
    "SamplingParams": "dsv3.serve.params",
    "load_pretrained": "dsv3.checkpoint.pretrained",
    "save_pretrained": "dsv3.checkpoint.pretrained",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dsv3' has no attribute '{name}'")
