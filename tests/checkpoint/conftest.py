"""Models and sound folders to start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.pretrained import save_pretrained
from dsv3.config import ModelConfig
from dsv3.model.transformer import Transformer
from tests.checkpoint.helpers import CONFIGS, random_model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Hundreds of tiny tensors: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def make_model(seed: int) -> Callable[..., Transformer]:
    """make_model(config or a key of CONFIGS, dtype=float32) -> Transformer."""

    def make(config: ModelConfig | str = "v3", dtype: torch.dtype = torch.float32) -> Transformer:
        return random_model(CONFIGS[config] if isinstance(config, str) else config, seed, dtype)

    return make


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[..., Transformer]) -> Path:
    """A sound BF16 checkpoint of the smallest V3, in three shards or more."""
    path = tmp_path / "sound"
    save_pretrained(make_model(), path, dtype=torch.bfloat16, max_shard_bytes=200_000)
    assert len(list(path.glob("*.safetensors"))) >= 3
    return path


@pytest.fixture
def fp8_folder(tmp_path: Path, make_model: Callable[..., Transformer]) -> Path:
    """A sound FP8 checkpoint with partial blocks, in one shard."""
    path = tmp_path / "sound-fp8"
    save_pretrained(make_model("v3-blocks"), path, dtype=torch.bfloat16, fp8=True)
    return path
