"""The live view: plain lines where there is no terminal, a redrawn frame where there is one."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest

from dsv3.errors import UserError
from dsv3.train import display as display_module
from dsv3.train.display import SECONDS_BETWEEN_LINES, TrainDisplay

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Stands in for `time`; moves only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def terminal_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display_module, "time", clock)
    return clock


@pytest.fixture
def metrics(seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {
        "step": 1,
        "tokens": 4096,
        "loss": rng.uniform(1, 9),
        "mtp_loss": rng.uniform(1, 9),
        "lr": rng.uniform(1e-5, 9e-4),
        "grad_norm": rng.uniform(0, 3),
        "max_vio": rng.uniform(0, 3),
        "tokens_per_second": rng.uniform(1e3, 9e4),
        "seconds": 1.0,
    }


def expected_readings(metrics: dict[str, float]) -> list[str]:
    return [
        f"loss {metrics['loss']:.3f}",
        f"MTP loss {metrics['mtp_loss']:.3f}",
        f"MaxVio {metrics['max_vio']:.2f}",
        f"lr {metrics['lr']:.2e}",
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
    ]


def run_plain(steps: range, total: int, metrics: dict[str, float], **options: object) -> list[str]:
    stream = io.StringIO()
    with TrainDisplay(total, stream=stream, **options) as display:  # type: ignore[arg-type]
        for step in steps:
            display.update(step, metrics)
    return stream.getvalue().splitlines()


def steps_of(lines: list[str]) -> list[int]:
    return [int(re.match(r"step (\d+)/", line)[1]) for line in lines]  # type: ignore[index]


def test_a_plain_line_holds_every_reading(metrics: dict[str, float]) -> None:
    (line,) = run_plain(range(5, 6), 20, metrics)
    assert line.startswith("step 5/20 (25%)  ")
    for reading in expected_readings(metrics):
        assert f"  {reading}  " in line


def test_plain_lines_come_every_n_steps_and_at_the_last(metrics: dict[str, float]) -> None:
    assert steps_of(run_plain(range(1, 12), 11, metrics, every=4)) == [4, 8, 11]
    stream = io.StringIO()
    with TrainDisplay(3, every=2, stream=stream) as display:
        display.update(3, metrics)
        display.log("what follows the last step")
    last_step, message = stream.getvalue().splitlines()
    assert steps_of([last_step]) == [3] and message == "what follows the last step"


def test_without_every_plain_lines_come_by_the_clock(clock: Clock, metrics: dict[str, float]) -> None:
    stream = io.StringIO()
    with TrainDisplay(100, stream=stream) as display:
        for step in range(1, 8):
            display.update(step, metrics)
            clock.now += SECONDS_BETWEEN_LINES / 2 + 0.1
    assert steps_of(stream.getvalue().splitlines()) == [1, 3, 5, 7]


def test_the_step_a_run_died_at_has_a_line(metrics: dict[str, float]) -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError, match="boom"), TrainDisplay(100, every=10, stream=stream) as display:
        for step in range(1, 14):
            display.update(step, metrics)
        raise RuntimeError("boom")
    assert steps_of(stream.getvalue().splitlines()) == [10, 13]


def test_time_left_counts_from_the_first_update(clock: Clock, metrics: dict[str, float]) -> None:
    stream = io.StringIO()
    with TrainDisplay(500, every=1, stream=stream) as display:
        clock.now += 3600  # data
        display.update(301, metrics)  # a resumed run's first step
        clock.now += 60
        display.update(321, metrics)  # 3 s a step, 179 to go
        clock.now += 60
        display.update(341, metrics)
    first, second, third = stream.getvalue().splitlines()
    assert first.endswith("1:00:00 elapsed, ? left")
    assert second.endswith("1:01:00 elapsed, 0:08:57 left")
    assert third.endswith("1:02:00 elapsed, 0:07:57 left")


def test_absent_metrics_are_left_out_and_nan_is_shown(metrics: dict[str, float]) -> None:
    del metrics["mtp_loss"], metrics["max_vio"]
    metrics["loss"] = float("nan")
    (line,) = run_plain(range(1, 2), 3, metrics)
    assert "loss nan" in line
    assert "MTP" not in line and "MaxVio" not in line


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_a_pipe_gets_no_control_codes(
    monkeypatch: pytest.MonkeyPatch, metrics: dict[str, float], variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    stream = io.StringIO()
    with TrainDisplay(2, every=1, stream=stream) as display:
        display.update(1, metrics)
        display.log("between")
        display.update(2, metrics)
    text = stream.getvalue()
    assert len(text.splitlines()) == 3
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, metrics: dict[str, float]) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with TrainDisplay(2, every=1, stream=stream) as display:
        display.update(1, metrics)
    assert "\x1b" not in stream.getvalue()
    assert steps_of(stream.getvalue().splitlines()) == [1]


def test_a_terminal_shows_the_last_state_and_gets_its_cursor_back(metrics: dict[str, float]) -> None:
    stream = Terminal()
    with TrainDisplay(40, stream=stream) as display:
        display.update(1, metrics | {"loss": 99.0})
        display.update(30, metrics)
    text = stream.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # shown again after it was hidden
    last_frame = CONTROL.sub("", text).rsplit("step ", 1)[1]
    assert last_frame.startswith("30/40 ")
    assert "75%" in last_frame
    for reading in expected_readings(metrics):
        assert reading in last_frame


def test_a_resumed_run_starts_where_it_was(metrics: dict[str, float]) -> None:
    stream = Terminal()
    with TrainDisplay(40, start_step=10, stream=stream):
        pass
    assert "step 10/40" in CONTROL.sub("", stream.getvalue())
    assert run_plain(range(0), 40, metrics, start_step=10) == []


def test_a_bar_that_never_moved_is_wiped() -> None:
    stream = Terminal()
    with TrainDisplay(40, stream=stream) as display:
        display.log("read the data")
    lines_up_and_wiped = "\x1b[1A\x1b[2K"
    assert stream.getvalue().endswith(lines_up_and_wiped)


def test_a_terminal_is_left_usable_by_an_error(metrics: dict[str, float]) -> None:
    stream = Terminal()
    with pytest.raises(RuntimeError, match="boom"), TrainDisplay(40, stream=stream) as display:
        display.update(30, metrics)
        raise RuntimeError("boom")
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("stream_type", [io.StringIO, Terminal])
def test_messages_are_printed_as_they_are(stream_type: type[io.StringIO], metrics: dict[str, float]) -> None:
    message = "[bold]held-out[/bold] 1.5 in /a/" + "long/" * 40
    stream = stream_type()
    with TrainDisplay(40, stream=stream) as display:
        display.log("before")
        display.update(1, metrics)
        display.log(message)
    lines = [line.strip() for line in CONTROL.sub("", stream.getvalue()).splitlines()]
    assert any(line.endswith("before") for line in lines)
    assert any(line.endswith(message) for line in lines)


@pytest.mark.parametrize("stream_type", [io.StringIO, Terminal])
def test_quiet_prints_nothing(stream_type: type[io.StringIO], metrics: dict[str, float]) -> None:
    stream = stream_type()
    with TrainDisplay(2, every=1, quiet=True, stream=stream) as display:
        display.update(1, metrics)
        display.log("hello")
        display.update(2, metrics)
    assert stream.getvalue() == ""


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str], metrics: dict[str, float]) -> None:
    with TrainDisplay(2) as display:
        display.update(2, metrics)
    assert steps_of(capsys.readouterr().out.splitlines()) == [2]


@pytest.mark.parametrize("every", [0, -3])
def test_every_must_be_positive(every: int) -> None:
    with pytest.raises(UserError, match=f"'every' is {every}"):
        TrainDisplay(10, every=every)
