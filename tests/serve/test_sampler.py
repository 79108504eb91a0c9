"""The sampler: each parameter by its definition, rows that do not feel each other, draws that depend on their place."""

from __future__ import annotations

import math

import pytest
import torch

from dsv3.errors import UserError
from dsv3.serve.params import Grammar, SamplingParams
from dsv3.serve.sampler import NOT_A_NUMBER, Row, adjusted, choose, describe
from dsv3.serve.sampling import distribution, distributions, draw_at
from tests.chi_square import chi_square_p


def slow_truncation(probs: list[float], top_k: int, top_p: float, min_p: float) -> list[float]:
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))[: top_k or None]
    whole = sum(probs[i] for i in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p and top_p < 1:
            break
        kept.append(token)
        mass += probs[token] / whole
    kept = [i for i in kept if probs[i] >= min_p * probs[order[0]]]
    rest = sum(probs[i] for i in kept)
    return [probs[i] / rest if i in kept else 0.0 for i in range(len(probs))]


def test_truncation_is_its_definition_row_by_row(generator):
    logits = 2 * torch.randn(24, 13, generator=generator)
    choices = [(k, p, m) for k in (0, 1, 4, 50) for p in (0.3, 0.9, 1.0) for m in (0.0, 0.2)]
    params = [SamplingParams(temperature=1.0, top_k=k, top_p=p, min_p=m) for k, p, m in choices]
    probs = distributions(logits, params)
    for row, (p, choice) in enumerate(zip(params, choices, strict=True)):
        expected = torch.tensor(slow_truncation(logits[row].double().softmax(-1).tolist(), *choice))
        torch.testing.assert_close(probs[row], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(distribution(logits[row], p), probs[row], atol=1e-6, rtol=1e-5)


def test_greedy_and_sampled_rows_lie_side_by_side(generator):
    logits = torch.randn(3, 7, generator=generator)
    params = [SamplingParams(), SamplingParams(temperature=0.5), SamplingParams()]
    probs = distributions(logits, params)
    assert probs[[0, 2]].argmax(-1).tolist() == logits[[0, 2]].argmax(-1).tolist() and (probs[1] > 0).all()


def test_draws_follow_the_distribution_and_their_place():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    tokens = [draw_at(probs, 7, position) for position in range(8000)]
    assert chi_square_p(torch.tensor(tokens).bincount(minlength=5).tolist(), probs.tolist()) > 1e-4
    assert tokens[:200] == [draw_at(probs, 7, position) for position in range(200)]
    assert tokens[:200] != [draw_at(probs, 8, position) for position in range(200)]
    seeds = [draw_at(probs, seed, 3) for seed in range(-2000, 6000)]
    assert chi_square_p(torch.tensor(seeds).bincount(minlength=5).tolist(), probs.tolist()) > 1e-4
    pairs = torch.tensor(tokens[:-1]) * 5 + torch.tensor(tokens[1:])  # neighbours are independent
    joint = (probs[:, None] * probs).flatten()
    assert chi_square_p(pairs.bincount(minlength=25).tolist(), joint.tolist()) > 1e-4
    assert draw_at(torch.ones(1), 0, 0) == 0


def test_like_distributions_draw_alike(generator):
    """What makes drafts stand: at one place two near distributions nearly always give the same token."""
    p = torch.randn(50, generator=generator).softmax(-1)
    q = (p * (1 + 0.02 * torch.randn(50, generator=generator))).clamp_min(0)
    q = q / q.sum()
    same = sum(draw_at(p, 1, place) == draw_at(q, 1, place) for place in range(2000))
    assert same > 1900


EXTREMES = [
    {"repetition_penalty": 5e-324},
    {"repetition_penalty": 1e308},
    {"temperature": 5e-324},
    {"top_p": 1e-124},
    {"top_k": 2**64},
    {"min_p": 5e-324, "frequency_penalty": 2.0, "presence_penalty": 2.0, "logit_bias": {2: 100.0, 3: 100.0}},
]


@pytest.mark.parametrize("extreme", EXTREMES)
def test_what_a_grammar_forbids_stays_forbidden_under_the_most_extreme_parameters(extreme, generator):
    logits = torch.randn(20, 12, generator=generator)
    logits[:, 7] = 0
    allowed = torch.zeros(12, dtype=torch.bool)
    allowed[[2, 5, 7]] = True
    params = SamplingParams(**{"temperature": 0.8, "seed": 1, **extreme})
    seen = list(range(12))
    rows = [Row(params, position, prompt=seen, output=seen[:3], allowed_V=allowed) for position in range(20)]
    assert set(choose(logits, rows)) <= {2, 5, 7}
    if "temperature" in extreme or "top_p" in extreme:
        assert choose(logits, rows) == logits.masked_fill(~allowed, -torch.inf).argmax(-1).tolist()


def test_penalties_and_bias_by_their_definitions(generator):
    logits = torch.randn(10, generator=generator)
    prompt, output = [1, 2, 2], [2, 3, 3, 3]
    params = SamplingParams(
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 1.5, 3: -2.0}
    )
    expected = logits.tolist()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token in set(output):
        expected[token] -= 0.5 + 0.25 * output.count(token)
    expected[4] += 1.5
    expected[3] -= 2.0
    row = Row(params, position=7, prompt=prompt, output=output)
    torch.testing.assert_close(adjusted(logits.clone(), row), torch.tensor(expected))


def test_bans_and_grammars():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    allowed = torch.tensor([False, True, False, True])
    assert choose(logits[None], [Row(SamplingParams(), 0, allowed_V=allowed)]) == [1]
    assert choose(logits[None], [Row(SamplingParams(), 0, banned=(0, 1))]) == [2]
    assert choose(logits[None], [Row(SamplingParams(), 0, banned=(1,), allowed_V=allowed)]) == [3]
    # Where a grammar leaves nothing but the end, it ends.
    assert choose(logits[None], [Row(SamplingParams(), 0, banned=(1, 3), allowed_V=allowed)]) == [1]


def test_rows_do_not_feel_each_other(generator):
    logits = torch.randn(6, 11, generator=generator)
    rows = [
        Row(SamplingParams(), 3),
        Row(SamplingParams(temperature=1.0, seed=1), 4),
        Row(SamplingParams(temperature=1.0, seed=1, top_k=3), 4),
        Row(SamplingParams(frequency_penalty=2.0), 5, output=[1, 2, 3]),
        Row(SamplingParams(temperature=0.3, seed=9, logit_bias={2: 5.0}), 6),
        Row(SamplingParams(), 3, banned=(0,)),
    ]
    together = choose(logits, rows)
    assert together == [choose(logits[[i]], [row])[0] for i, row in enumerate(rows)]
    broken = logits.clone()
    broken[1, 3], broken[3] = float("nan"), float("inf")
    expected = [NOT_A_NUMBER if i in (1, 3) else token for i, token in enumerate(together)]
    assert choose(broken, rows) == expected
    assert choose(broken[:2], rows[:1] * 2) == [together[0], NOT_A_NUMBER]


def test_log_probabilities():
    logits = torch.tensor([1.0, 3.0, 2.0])
    whole = math.log(math.e + math.e**2 + math.e**3)
    logprob, top = describe(logits, 0, 2)
    assert logprob == pytest.approx(1 - whole)
    assert [i for i, _ in top] == [1, 2] and [p for _, p in top] == pytest.approx([3 - whole, 2 - whole])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"n": 0}, "n is 0"),
        ({"n": 129}, "n is 129"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens is 5, expected at most max_tokens \(4\)"),
        ({"stop": "text"}, "stop is 'text'"),
        ({"stop": ("",)}, "stop is"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids is -1"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logit_bias": {1: 101}}, "logit_bias is 101"),
        ({"logit_bias": {"1": 1}}, "logit_bias token is '1'"),
        ({"logit_bias": [1]}, "logit_bias is"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": 1.0}, "seed is 1.0"),
    ],
)
def test_senseless_parameters_are_errors(settings, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize(("kind", "source"), [("xml", "x"), ("regex", ""), ("regex", {}), ("json_schema", "{}")])
def test_senseless_grammars_are_errors(kind, source):
    with pytest.raises(UserError, match="grammar"):
        Grammar(kind, source)
