"""A run while it goes: a live panel on a terminal, a line of log now and then elsewhere."""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qwq_jax.rl.chart import thinned
from qwq_jax.rl.measures import MEASURES, Measure, mean_phases

LOG_SECONDS = 5.0
DRAW_SECONDS = 0.5
RECENT_STEPS = 10
"""Steps that means are taken over: of the second number of a measure, and of the time of phases."""

_SPARK_WIDTH = 40
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_PHASE_WIDTH = 48
_PHASE_COLOURS = {"rollout": "cyan", "reward": "yellow", "update": "green", "sync": "magenta"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class View:
    """All that the panel shows.

    Attributes:
        title: Of the run.
        step: The last step taken.
        steps: The last one of the run.
        history: A record a step, of earlier runs too.
        seconds_per_step: Of this run; None before its first step.
        phase: What it is at; empty where nobody said.
        ascii_only: Draws with what every terminal has.
    """

    title: str
    step: int
    steps: int
    history: Sequence[Mapping[str, float]] = ()
    seconds_per_step: float | None = None
    phase: str = ""
    ascii_only: bool = False

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the pace of this run."""
        return None if self.seconds_per_step is None else self.seconds_per_step * (self.steps - self.step)


def render(view: View) -> RenderableType:
    """The panel: progress, a row a measure with its course, and what the time of a step goes to."""
    parts: list[RenderableType] = [_progress(view), _measures(view)]
    seconds = mean_phases(view.history[-RECENT_STEPS:])
    if seconds:
        parts += [Text(), *_phases(seconds, view.ascii_only)]
    return Panel(Group(*parts), title=Text(view.title), title_align="left")


def line(view: View) -> str:
    """The same in one line, for a log."""
    record = view.history[-1] if view.history else {}
    values = [(measure, measure.of(record)) for measure in MEASURES]
    words = [f"{measure.label} {measure.written(value)}" for measure, value in values if value is not None]
    if view.seconds_per_step is not None:
        words.append(f"{view.seconds_per_step:.3g} s a step")
    if view.seconds_left:
        words.append(f"{duration(view.seconds_left)} left")
    return f"step {view.step} of {view.steps}" + (": " if words else "") + ", ".join(words)


def sparkline(values: Sequence[float], *, width: int = _SPARK_WIDTH, ascii_only: bool = False) -> str:
    """Values as blocks from their least to their greatest; more than `width` of them as means of neighbours.

    >>> sparkline([0, 1, 2, 3, 7])
    '▁▂▃▄█'
    """
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    shown = [value for _, value in thinned(tuple((0.0, value) for value in values), width)]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    if not high > low:
        return blocks[len(blocks) // 2] * len(shown)
    return "".join(blocks[round((value - low) / (high - low) * (len(blocks) - 1))] for value in shown)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3725.2)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class Dashboard:
    """Shows a run from its records; enter it before the first step.

    While it is live, the log is printed above it.

    Example:
        >>> with Dashboard("tiny_grpo", steps=120) as dashboard:
        ...     dashboard.update(1, {"reward": 0.4, "seconds_rollout": 2.1})

    Args:
        title: Of the run.
        steps: Its last step.
        history: Records of the steps before this run.
        console: Where the panel goes; stderr otherwise. If that is no terminal, lines are logged.
        shown: Otherwise nothing is shown or logged: one process of several speaks.
        clock: In seconds.
    """

    def __init__(
        self,
        title: str,
        *,
        steps: int,
        history: Iterable[Mapping[str, float]] = (),
        console: Console | None = None,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._steps = steps
        self._history = list(history)
        self._step = self._first = int(self._history[-1]["step"]) if self._history else 0
        self._console = console or Console(stderr=True)
        self._shown = shown
        self._clock = clock
        self._started = clock()
        self._logged = self._drawn = -math.inf
        self._phase = ""
        self._live: Live | None = None
        self._redirected: list[tuple[logging.StreamHandler, object]] = []

    def __enter__(self) -> Self:
        self._started = self._clock()
        if self._shown and self._console.is_terminal:
            before = sys.stderr
            self._live = Live(get_renderable=lambda: render(self.view), console=self._console, auto_refresh=False)
            self._live.start()
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                    self._redirected.append((handler, handler.setStream(sys.stderr)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._redirected.clear()
        if self._live is not None:
            self._live.stop()
            self._live = None

    @property
    def view(self) -> View:
        """What is shown now."""
        taken = self._step - self._first
        pace = (self._clock() - self._started) / taken if taken > 0 else None
        ascii_only = not self._console.encoding.startswith("utf")
        return View(self._title, self._step, self._steps, self._history, pace, self._phase, ascii_only)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the record of a step."""
        self._step, self._phase = step, ""
        self._history.append({"step": step, **values})
        if self._live is not None:
            self._draw(self._live)
        elif self._shown and (self._clock() - self._logged >= LOG_SECONDS or step >= self._steps):
            self._logged = self._clock()
            _log.info("%s", line(self.view))

    def phase(self, name: str) -> None:
        """Says what the run is at, such as ``rollout``."""
        self._phase = name
        if self._live is not None:
            self._draw(self._live)

    def _draw(self, live: Live) -> None:
        """Now, unless that was just done: it takes some 40 ms, and the exit draws the last step in any case."""
        if self._clock() - self._drawn >= DRAW_SECONDS:
            live.refresh()
            self._drawn = self._clock()


def _progress(view: View) -> RenderableType:
    words = [f"step {view.step} of {view.steps}"]
    if view.seconds_per_step is not None:
        words.append(f"{view.seconds_per_step:.3g} s a step")
    if view.seconds_left:
        words.append(f"{duration(view.seconds_left)} left")
    if view.phase:
        words.append(f"at {view.phase}")
    separator = ", " if view.ascii_only else " · "
    grid = Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=max(view.steps, 1), completed=view.step, width=24), separator.join(words))
    return grid


def _measures(view: View) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("measure")
    table.add_column("last", justify="right", style="bold")
    table.add_column(f"mean of {RECENT_STEPS}", justify="right")
    table.add_column("course of the run")
    for measure in MEASURES:
        values = [value for record in view.history if (value := measure.of(record)) is not None]
        if values:
            table.add_row(*_row(measure, values, view.ascii_only))
    return table


def _row(measure: Measure, values: Sequence[float], ascii_only: bool) -> list[Text]:
    recent = values[-RECENT_STEPS:]
    return [
        Text(measure.label),
        Text(measure.written(values[-1])),
        Text(measure.written(sum(recent) / len(recent))),
        Text(sparkline(values, ascii_only=ascii_only), style="cyan"),
    ]


def _phases(seconds: Mapping[str, float], ascii_only: bool) -> list[RenderableType]:
    """The time of a step as one bar, and below it the seconds of each phase."""
    whole = sum(seconds.values()) or 1.0
    bar, words = Text(), Text()
    for name, each in seconds.items():
        colour = _PHASE_COLOURS.get(name, "red")
        bar.append((name[0] if ascii_only else "█") * round(_PHASE_WIDTH * each / whole), style=colour)
        words.append(f"{name} ", style=colour)
        words.append(f"{each:.3g} s, {each / whole:.0%}   ")
    return [bar, words]
