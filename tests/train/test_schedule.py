"""Schedules over tokens: the report's own by hand, the notation, and what is no schedule."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsv3.errors import UserError
from dsv3.train.schedule import parse_schedule, parse_tokens

B, T = 10**9, 10**12
REPORT = "0, linear 2.2e-4 25B, hold 10T, cosine 2.2e-5 4.3T, hold 333B, set 7.3e-6"
END_OF_DECAY = 25 * B + 14.3 * T


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 0.0),
        (12.5 * B, 1.1e-4),
        (25 * B, 2.2e-4),
        (5 * T, 2.2e-4),
        (25 * B + 10 * T, 2.2e-4),
        (25 * B + (10 + 4.3 / 3) * T, 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.75),  # cos 60 degrees is one half
        (25 * B + (10 + 4.3 / 2) * T, (2.2e-4 + 2.2e-5) / 2),
        (END_OF_DECAY, 2.2e-5),
        (END_OF_DECAY + 332 * B, 2.2e-5),
        (END_OF_DECAY + 333 * B, 7.3e-6),
        (10**20, 7.3e-6),
    ],
)
def test_the_reports_learning_rate(tokens, rate):
    assert parse_schedule(REPORT, 15 * T)(tokens) == pytest.approx(rate, rel=1e-9)


def test_the_reports_batch_size_gamma_and_lambda():
    batch = parse_schedule("3072, linear 15360 469B", 15 * T)
    assert [batch(t * B) for t in (0, 234.5, 469, 1000)] == pytest.approx([3072, 9216, 15360, 15360])
    gamma = parse_schedule("0.001, hold 14.3T, set 0", 15 * T)
    assert [gamma(t * T) for t in (0, 14.2999, 14.3, 15)] == [0.001, 0.001, 0.0, 0.0]
    weight = parse_schedule("0.3, hold 10T, set 0.1", 15 * T)
    assert [weight(t * T) for t in (0, 9.99, 10, 15)] == [0.3, 0.3, 0.1, 0.1]


def test_a_number_is_a_constant():
    constant = parse_schedule("0.25", 1000)
    assert [constant(t) for t in (0, 500, 10**9)] == [0.25] * 3 and constant.boundaries == []


def test_shares_are_of_the_whole_run():
    shares = parse_schedule("0, linear 1 5%, hold 20%, cosine 0 75%", 2000)
    assert shares.boundaries == [100, 500, 2000]
    assert [shares(t) for t in (0, 50, 100, 499, 1250, 2000)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0], abs=1e-12)


@given(
    st.lists(
        st.tuples(st.sampled_from(["linear", "cosine", "hold"]), st.integers(0, 9), st.integers(1, 50)), max_size=5
    ),
    st.integers(0, 300),
)
def test_any_schedule_is_walked_segment_by_segment(parts, tokens):
    text, value, at, expected = "3", 3.0, 0, None
    for kind, target, length in parts:
        text += f", hold {length}" if kind == "hold" else f", {kind} {target} {length}"
        end = value if kind == "hold" else float(target)
        if expected is None and tokens < at + length:
            share = (tokens - at) / length
            share = (1 - math.cos(math.pi * share)) / 2 if kind == "cosine" else share
            expected = value + (end - value) * share
        value, at = end, at + length
    schedule = parse_schedule(text, 1000)
    assert schedule(tokens) == pytest.approx(value if expected is None else expected)
    assert schedule.boundaries == [sum(length for *_, length in parts[: i + 1]) for i in range(len(parts))]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1", 1), ("500K", 500_000), ("1.6M", 1_600_000), (" 25B ", 25 * B), ("14.8T", 14_800_000_000_000), ("2e3", 2000)],
)
def test_numbers_of_tokens(text, tokens):
    assert parse_tokens(text, "tokens") == tokens


@pytest.mark.parametrize("text", ["", "0", "0.2", "-5", "5 K", "5k", "five", "1.2.3M", "nan", "inf", "5%", "K"])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(UserError, match="setting 'tokens' is "):
        parse_tokens(text, "tokens")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "0 1",
        "-1",
        "nan",
        "inf",
        "1,",
        "1, linear 2",
        "1, linear two 5%",
        "1, linear -2 5%",
        "1, linear nan 5%",
        "1, cosine 2 5% 3",
        "1, hold",
        "1, hold 120%",
        "1, hold -5%",
        "1, hold many",
        "1, hold 0",
        "1, set",
        "1, set inf",
        "1, jump 3",
    ],
)
def test_what_is_no_schedule(text):
    with pytest.raises(UserError, match="setting 'learning_rate' "):
        parse_schedule(text, 1000, "learning_rate")
