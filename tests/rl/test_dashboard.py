"""The panel as text, drawn for a recording console, and what a log gets in its place."""

import io
import logging
import sys

import pytest
from rich.console import Console

from qwq_jax.rl.dashboard import Dashboard, View, duration, line, render, sparkline
from qwq_jax.rl.measures import Form, Measure, mean_phases, phase_seconds


def record(step, **values):
    return {"step": step, "reward": step / 100, "clip_low": 0.01, "clip_high": 0.02, **values}


def drawn(view, width=100):
    console = Console(width=width, file=io.StringIO(), record=True, force_terminal=True)
    console.print(render(view))
    return console.export_text()


def row(text, label):
    return next(each for each in text.splitlines() if f" {label} " in each).split(label, 1)[1].split()


HISTORY = [
    record(step, tokens_per_second=5120.4, seconds_rollout=6.0, seconds_update=2.0, seconds_save=0.0)
    for step in range(1, 61)
]


def test_the_panel_shows_progress_measures_and_phases():
    text = drawn(View("tiny_grpo", 60, 120, HISTORY, 8.5))
    assert "tiny_grpo" in text and "step 60 of 120 · 8.5 s a step · 0:08:30 left" in text
    last, mean, course, _ = row(text, "reward")
    assert (last, mean) == ("0.6", "0.555") and course == sparkline([each["reward"] for each in HISTORY])
    assert row(text, "clipped")[:2] == ["3.0%", "3.0%"]
    assert row(text, "tokens/s")[:2] == ["5,120", "5,120"]
    assert "entropy" not in text, "the run has no such number"
    assert "rollout 6 s, 75%" in text and "update 2 s, 25%" in text and "save 0 s, 0%" in text
    bar = next(each for each in text.splitlines() if "█" * 20 in each)
    assert bar.count("█") == 48


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_panel_fits_its_terminal(width):
    text = drawn(View("a run with a title that is rather long for a small terminal", 3, 120, HISTORY[:3], 1.0), width)
    assert max(map(len, text.splitlines())) <= width


def test_the_panel_before_the_first_step():
    text = drawn(View("run", 0, 10))
    assert "step 0 of 10" in text and "left" not in text and "s a step" not in text


def test_markup_in_a_title_is_text():
    assert "[red]x[/red]" in drawn(View("[red]x[/red]", 0, 1))


def test_numbers_that_are_none_do_not_break_it():
    text = drawn(View("run", 2, 10, [record(1, entropy=float("nan")), record(2, entropy=float("inf"))]))
    assert "entropy" not in text


def test_a_terminal_without_blocks_gets_letters():
    text = drawn(View("run", 60, 120, HISTORY, 1.0, ascii_only=True))
    (course,) = row(text, "reward")[2:3]
    assert course.isascii() and "rrrr" in text and "uuuu" in text
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), force_terminal=True, width=100)
    with Dashboard("run", steps=120, history=HISTORY, console=console) as dashboard:
        dashboard.phase("rollout")
        dashboard.update(61, record(61))


def test_sparklines():
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0, 2.0]) == "▅▅▅"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, -4]) == "█▁"
    long = sparkline(range(1000), width=40)
    assert len(long) == 40 and list(long) == sorted(long)


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 3725.2, 100 * 3600)] == ["0:00:00", "0:01:00", "1:02:05", "100:00:00"]


def test_times_of_phases_are_means_over_the_records_that_have_them():
    records = [{"step": 1}, {"step": 2, "seconds_rollout": 2.0}, {"step": 3, "seconds_rollout": 4.0, "seconds_save": 1}]
    assert mean_phases(records) == {"rollout": 3.0, "save": 0.5}
    assert mean_phases([]) == {}
    mixed = {"seconds": 9.0, "seconds_other": 1.0, "seconds_save": 2.0, "seconds_rollout": 3.0}
    assert list(phase_seconds(mixed).items()) == [("rollout", 3.0), ("save", 2.0), ("other", 1.0)]
    assert list(mean_phases([{"seconds_save": 2.0}, mixed])) == ["rollout", "save", "other"]
    assert "other 1 s, 17%" in drawn(View("run", 1, 2, [{"step": 1, **mixed}]))


def test_numbers_are_written_so_that_they_can_be_read():
    number, share, count = (Measure("x", ("x",), form) for form in (Form.NUMBER, Form.SHARE, Form.COUNT))
    assert [number.written(v) for v in (0.0, 0.12345, 12.3456, 1234.5, 2e-7, -3e6)] == [
        "0", "0.123", "12.3", "1,234", "2.0e-07", "-3.0e+06",
    ]  # fmt: skip
    assert (share.written(0.0815), count.written(12345.6)) == ("8.2%", "12,346")
    assert Measure("x", ("a", "b")).of({"a": 1.0, "c": 5.0}) == 1.0 and Measure("x", ("a",)).of({}) is None


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_without_a_terminal_lines_are_logged_now_and_then_and_at_the_end(caplog):
    clock = Clock()
    caplog.set_level(logging.INFO, logger="qwq_jax")
    out = io.StringIO()
    with Dashboard("run", steps=20, console=Console(file=out), clock=clock) as dashboard:
        for step in range(1, 21):
            clock.now += 2.0
            dashboard.update(step, {"reward": 0.5, "seconds_rollout": 1.0})
    assert not out.getvalue()
    assert caplog.messages[0] == "step 1 of 20: reward 0.5, 2 s a step, 0:00:38 left"
    assert [int(message.split()[1]) for message in caplog.messages] == [1, 4, 7, 10, 13, 16, 19, 20]
    assert caplog.messages[-1] == "step 20 of 20: reward 0.5, 2 s a step"


def test_a_resumed_run_goes_on_with_its_history_and_its_own_pace():
    clock = Clock()
    console = Console(file=io.StringIO(), width=100)
    with Dashboard("run", steps=100, history=HISTORY, console=console, clock=clock) as dashboard:
        assert dashboard.view.seconds_left is None
        clock.now += 3.0
        dashboard.update(61, record(61))
        view = dashboard.view
    assert (view.step, view.seconds_per_step, view.seconds_left) == (61, 3.0, 117.0)
    assert len(view.history) == 61 and line(view).startswith("step 61 of 100: reward 0.61, clipped 3.0%")


def test_on_a_terminal_it_is_live_and_the_log_goes_above_it(monkeypatch):
    screen, errors = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger()
    monkeypatch.setattr(logger, "handlers", [handler])  # alone: a command tested before may have left its own
    console = Console(file=screen, force_terminal=True, width=100)
    with Dashboard("run", steps=2, console=console, clock=lambda: 0.0) as dashboard:
        dashboard.phase("rollout")
        dashboard.update(1, {"reward": 0.25})
        logger.warning("a word in between")
        dashboard.update(2, {"reward": 0.75})
    logger.warning("after it")
    assert "step 0 of 2 · at rollout" in screen.getvalue() and "step 1 of 2 · at" not in screen.getvalue()
    assert "a word in between" in screen.getvalue() and "0.75" in screen.getvalue()
    assert errors.getvalue() == "after it\n"


def test_a_process_that_is_not_to_speak_is_silent(caplog):
    caplog.set_level(logging.INFO, logger="qwq_jax")
    screen = io.StringIO()
    with Dashboard("run", steps=1, console=Console(file=screen, force_terminal=True), shown=False) as dashboard:
        dashboard.update(1, {"reward": 0.25})
    assert not screen.getvalue() and not caplog.messages


def test_the_terminal_is_given_back_after_an_error():
    screen = io.StringIO()
    with pytest.raises(RuntimeError), Dashboard("run", steps=1, console=Console(file=screen, force_terminal=True)):
        raise RuntimeError
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1, "the cursor is back"
