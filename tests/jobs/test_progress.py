"""The progress of a batch: counts, pace and time left, as a bar or as lines of log."""

import io
import logging

import pytest

from qwq_jax.jobs import progress
from qwq_jax.jobs.progress import BatchProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the time is; the test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_of_log_come_every_few_seconds_and_at_the_end(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="qwq_jax")
    with BatchProgress(total=100, done=40) as shown:
        clock[0] += 1.0
        shown.update(41, 10)
        assert not caplog.messages, "too early"
        clock[0] += 9.0
        shown.update(50, 490)
        # 500 tokens in 10 s; 10 requests of this run in 10 s, and 50 to go: those done before it do not count.
        assert caplog.messages == ["50 of 100 requests, 50 tokens/s, 0:00:50 left"]
        assert shown.tokens_per_second == 50.0
        clock[0] += 10.0
        shown.update(100, 500)
    assert caplog.messages[-1] == "100 of 100 requests, 50 tokens/s"


def test_time_left_waits_for_the_first_answer(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="qwq_jax")
    with BatchProgress(total=10_000, done=0) as shown:
        clock[0] += 6.0
        shown.update(0, 60)
        clock[0] += 6.0
        shown.update(10, 60)
    assert caplog.messages[:2] == [
        "0 of 10000 requests, 10 tokens/s",
        "10 of 10000 requests, 10 tokens/s, 3:19:48 left",
    ]


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with BatchProgress(total=8, done=2) as shown:
        shown.update(8, 1234)
    assert "answering" in terminal.getvalue() and "8/8" in terminal.getvalue()
    assert "requests" in terminal.getvalue() and "tokens/s" in terminal.getvalue()
