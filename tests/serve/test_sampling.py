"""From logits to tokens: the distribution by its definition, and exact speculative sampling."""

from __future__ import annotations

import math

import pytest
import torch

from dsv3.errors import UserError
from dsv3.serve.sampling import SamplingParams, distribution, draw, verify_drafts
from tests.chi_square import chi_square_p


def slow_distribution(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Softmax at a temperature, then the smallest set of most probable tokens with at least that much mass."""
    weights = [math.exp(x / temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += probs[token]
        if mass >= top_p:
            break
    return [probs[i] / mass if i in kept else 0.0 for i in range(len(probs))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.9, 1.0])
def test_distribution_is_its_definition(temperature, top_p, generator):
    logits = 2 * torch.randn(6, 11, generator=generator)
    probs = distribution(logits, SamplingParams(temperature, top_p))
    expected = torch.tensor([slow_distribution(row, temperature, top_p) for row in logits.tolist()])
    torch.testing.assert_close(probs, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_greedy_is_certain_of_the_first_largest(dtype):
    logits = torch.tensor([[0.0, 3.0, -1.0, 3.0], [-5.0, -7.0, -6.0, -9.0]], dtype=dtype)
    probs = distribution(logits, SamplingParams())
    assert probs.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]] and probs.dtype == torch.float32


def test_a_tiny_temperature_is_nearly_greedy_and_does_not_overflow(generator):
    logits = 1e4 * torch.randn(5, 9, generator=generator)
    probs = distribution(logits, SamplingParams(temperature=1e-36))
    assert probs.isfinite().all()
    torch.testing.assert_close(probs, distribution(logits, SamplingParams()))


def test_equal_tokens_are_cut_at_the_lower_index():
    probs = distribution(torch.zeros(1, 4), SamplingParams(temperature=1.0, top_p=0.5))
    assert probs.tolist() == [[0.5, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_senseless_settings_are_errors(settings, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**settings)


def test_a_seed_fixes_the_draws():
    probs = torch.full((50, 10), 0.1)
    first, again = (draw(probs, SamplingParams(1.0, seed=7).generator()) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.int64 and first.shape == (50,)
    assert not torch.equal(first, draw(probs, SamplingParams(1.0, seed=8).generator()))
    fresh = [draw(probs, SamplingParams(1.0).generator()) for _ in range(2)]
    assert not torch.equal(*fresh)


def test_draws_follow_the_distribution(generator):
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    tokens = draw(probs.expand(8000, -1), generator)
    assert chi_square_p(tokens.bincount(minlength=5).tolist(), probs.tolist()) > 1e-4


def random_probs(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return (1.5 * torch.randn(shape, generator=generator)).softmax(-1)


def test_verified_drafts_are_distributed_as_the_target(generator):
    """Two drafts from q, checked by p: the first two tokens that come out are p's, whatever q is."""
    V, rounds = 4, 12_000
    q, p = random_probs((2, V), generator), random_probs((3, V), generator)
    p[0, 1], q[1, 2] = 0.0, 0.0  # what the target never says, and what the draft never says
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    drafts = torch.stack([draw(q[k].expand(rounds, -1), generator) for k in range(2)], dim=1).tolist()
    first, second, stood_times = [0] * V, [0] * V, [0] * 3
    for pair in drafts:
        stood, follower = verify_drafts(pair, q, p, generator)
        out = [*pair[:stood], follower]
        stood_times[stood] += 1
        first[out[0]] += 1
        if stood:  # the first draft stood: the second token comes from p[1]
            second[out[1]] += 1
    assert chi_square_p(first, p[0].tolist()) > 1e-4
    assert chi_square_p(second, p[1].tolist()) > 1e-4
    # A draft stands with probability sum min(p, q): as often as exactness allows.
    stands = torch.minimum(p[:2], q).sum(1).tolist()
    expected = [1 - stands[0], stands[0] * (1 - stands[1]), stands[0] * stands[1]]
    assert chi_square_p(stood_times, expected) > 1e-4


def test_the_token_behind_drafts_that_all_stood_is_the_targets_next(generator):
    q = torch.eye(3)[[1, 2]]
    p = torch.stack((q[0], q[1], torch.tensor([0.2, 0.0, 0.8])))
    followers = [0] * 3
    for _ in range(2000):
        stood, follower = verify_drafts([1, 2], q, p, generator)
        assert stood == 2
        followers[follower] += 1
    assert chi_square_p(followers, [0.2, 0.0, 0.8]) > 1e-4


def test_equal_distributions_always_stand_and_impossible_drafts_never(generator):
    p = random_probs((2, 6), generator)
    assert all(verify_drafts([int(draw(p[:1], generator))], p[:1], p, generator)[0] == 1 for _ in range(300))
    q = torch.eye(6)[[4]]
    p[0, 4] = 0
    p = p / p.sum(1, keepdim=True)
    outcomes = [verify_drafts([4], q, p, generator) for _ in range(300)]
    assert {stood for stood, _ in outcomes} == {0} and 4 not in {token for _, token in outcomes}


def test_without_drafts_the_target_is_drawn_from(generator):
    p = torch.eye(5)[[3]]
    assert verify_drafts([], torch.zeros(0, 5), p, generator) == (0, 3)


def test_a_draft_that_falls_by_a_rounding_error_is_replaced(generator, monkeypatch):
    """p and q differ in the last bit of the draft's probability only, and the draw is the largest there is."""
    q = torch.tensor([[0.5, 0.5]])
    p = torch.tensor([[0.5 - 2**-25, 0.5], [1.0, 0.0]])
    monkeypatch.setattr("dsv3.serve.sampling.torch.rand", lambda *_, **__: torch.tensor(1 - 2**-24))
    stood, follower = verify_drafts([0], q, p, generator)
    assert stood in (0, 1) and follower in (0, 1)
