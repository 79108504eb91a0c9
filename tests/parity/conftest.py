"""What the comparisons with transformers share beside the twins themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.generation.candidate_generator import MTPCandidateGenerator

from tests.parity.twin import TheirMatches


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The models are so tiny that two threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def their_matches(monkeypatch: pytest.MonkeyPatch) -> TheirMatches:
    """How many drafts stood in each verification that transformers made since the last call."""
    matches: list[int] = []
    monkeypatch.setattr(
        MTPCandidateGenerator,
        "update_candidate_strategy",
        lambda generator, input_ids, scores, num_matches: matches.append(int(num_matches)),
    )

    def take() -> list[int]:
        taken = matches[1:]  # the prompt's own pass has no drafts to judge
        matches.clear()
        return taken

    return take
