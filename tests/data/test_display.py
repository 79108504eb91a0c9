import io
import itertools

import pytest

from dsv3.data import display as display_module
from dsv3.data.display import PrepareDisplay
from dsv3.data.prepare import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes six seconds from one look to the next."""
    times = itertools.count(0, 6.0)
    monkeypatch.setattr(display_module.time, "monotonic", lambda: next(times))


def test_a_log_has_messages_and_a_line_now_and_then(clock):
    stream = io.StringIO()
    with PrepareDisplay(stream=stream) as display:
        display.report("read [a]")
        for number in range(1, 6):
            display.advance(Progress("encoding 'a'", number * 1_000_000, 10_000_000, number * 300))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "read [a]" and lines[1:] == [
        "encoding 'a' (20%): 2.0 MB, 600 tokens",
        "encoding 'a' (40%): 4.0 MB, 1,200 tokens",
    ]


def test_an_unknown_end_has_no_share(clock):
    stream = io.StringIO()
    with PrepareDisplay(stream=stream) as display:
        for _ in range(2):
            display.advance(Progress("reading 'a'", 2_500_000))
    assert stream.getvalue() == "reading 'a': 2.5 MB\n"


def test_a_terminal_has_a_bar_for_each_stage():
    stream = Terminal()
    with PrepareDisplay(stream=stream) as display:
        display.advance(Progress("reading", 1_000_000))
        display.report("between [stages]")
        display.advance(Progress("encoding", 500_000, 2_000_000, 70_000))
    shown = stream.getvalue()
    assert "between [stages]" in shown
    reading, encoding = shown.split("between [stages]")
    assert "reading" in reading and "1.0 MB" in reading and "encoding" not in reading
    assert "encoding" in encoding and " 25%" in encoding and "70,000 tokens" in encoding


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_quiet_prints_nothing(clock, kind):
    stream = kind()
    with PrepareDisplay(quiet=True, stream=stream) as display:
        display.report("message")
        for number in range(5):
            display.advance(Progress("stage", number, 5, number))
    assert stream.getvalue() == ""
