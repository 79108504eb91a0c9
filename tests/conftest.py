"""What every test leans on: one thread, and random inputs that can be had again.

A test's `seed` follows from its name and from `--seed` (default 0): each test has inputs of its own, a failure
repeats, and `pytest --seed 7` tries the whole suite on others.
"""

from __future__ import annotations

import zlib

import hypothesis
import pytest
import torch

# Test models are tiny: a second thread costs more than it brings, and on a busy machine far more.
torch.set_num_threads(1)

# No test is timed: on a busy machine hypothesis' deadline would fail what is right.
hypothesis.settings.register_profile("dsv3", deadline=None)
hypothesis.settings.load_profile("dsv3")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="where the random inputs of all tests start from")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed, in [0, 2^32)."""
    return zlib.crc32(f"{request.config.getoption('--seed')} {request.node.nodeid}".encode())


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A CPU generator that starts from this test's own seed."""
    return torch.Generator().manual_seed(seed)
