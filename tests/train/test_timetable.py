import dataclasses
import itertools

import pytest

from dsv3.errors import UserError
from dsv3.train.config import TrainConfig
from dsv3.train.schedule import parse_schedule, parse_tokens
from dsv3.train.timetable import timetable

REPORT_RATE = "0, linear 2.2e-4 25B, hold 9.975T, cosine 2.2e-5 4.3T, hold 333B, set 7.3e-6"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.0),
        (12.5e9, 1.1e-4),
        (25e9, 2.2e-4),
        (9.9e12, 2.2e-4),
        (12.15e12, (2.2e-4 + 2.2e-5) / 2),  # halfway down the cosine
        (14.3e12, 2.2e-5),
        (14.6e12, 2.2e-5),
        (14.633e12, 7.3e-6),
        (14.8e12, 7.3e-6),
    ],
)
def test_the_reports_learning_rate(tokens, expected):
    assert parse_schedule(REPORT_RATE, 14_800_000_000_000)(tokens) == pytest.approx(expected, rel=1e-9)


def test_shares_are_of_the_whole_run():
    schedule = parse_schedule("0, linear 1 10%, hold 40%, cosine 0.5 50%", 1000)
    assert [schedule(t) for t in (50, 100, 500, 750, 1000, 5000)] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.5])
    assert schedule.boundaries == [100, 500, 1000]


def test_a_number_is_a_constant():
    assert {parse_schedule("0.3", 10)(t) for t in (0, 5, 100)} == {0.3}


@pytest.mark.parametrize(("text", "tokens"), [("500", 500), ("1.6M", 1_600_000), ("14.8T", 14_800_000_000_000)])
def test_numbers_of_tokens(text, tokens):
    assert parse_tokens(text, "tokens") == tokens


@pytest.mark.parametrize("text", ["", "0", "-3", "1.6m", "lots", "1.2.3M"])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(UserError, match="'tokens' is"):
        TrainConfig(tokens=text)


@pytest.mark.parametrize("name", ["learning_rate", "batch_size", "mtp_weight", "bias_update_speed"])
@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1, linear 2", "1, rise 2 3M", "1, hold 120%", "1, cosine x 5%", "nan"]
)
def test_what_is_no_schedule_is_refused_by_name(name, text):
    with pytest.raises(UserError, match=f"'{name}'"):
        TrainConfig(**{name: text})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, 0) for name in ("seq_len", "clip", "eval_every", "eval_tokens", "save_every", "keep", "eps")],
        ("micro_batch_size", 0),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("held_out", 0.0),
        ("held_out", 1.0),
        ("batch_size", "4, linear 0 50%"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"'{name}'"):
        TrainConfig(**{name: value})


def test_the_batch_grows_in_whole_micro_batches():
    config = TrainConfig(tokens="64K", seq_len=100, batch_size="4, linear 40 50%", micro_batch_size=4)
    steps = list(timetable(config))
    sizes = [step.sequences for step in steps]
    assert sizes[0] == 4 and sizes == sorted(sizes) and sizes[-1] == 40
    assert all(size % 4 == 0 for size in sizes)
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    # Sequences follow each other without gap or overlap, and the run ends with the first step at or past its tokens.
    for before, step in itertools.pairwise(steps):
        assert step.first_sequence == before.first_sequence + before.sequences
    assert steps[-2].tokens < 64_000 <= steps[-1].tokens == 100 * sum(sizes)


def test_settings_are_those_at_the_end_of_a_step():
    config = TrainConfig(
        tokens="4K",
        seq_len=100,
        batch_size="10",
        learning_rate="0, linear 1 50%, hold 50%",
        mtp_weight="0.3, hold 2K, set 0.1",
        bias_update_speed="0.001, hold 75%, set 0",
    )
    steps = list(timetable(config))
    assert [step.learning_rate for step in steps] == [0.5, 1.0, 1.0, 1.0]
    assert [step.mtp_weight for step in steps] == [0.3, 0.1, 0.1, 0.1]
    assert [step.bias_update_speed for step in steps] == [0.001, 0.001, 0.0, 0.0]


def test_the_course_is_the_same_whatever_the_micro_batch():
    config = TrainConfig(tokens="100K", batch_size="8")
    assert list(timetable(config)) == list(timetable(dataclasses.replace(config, micro_batch_size=2)))
