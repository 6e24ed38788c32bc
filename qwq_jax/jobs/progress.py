"""How far a batch has come: a bar on a terminal, a line of log every few seconds elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_SECONDS = 5.0

_log = logging.getLogger(__name__)


class BatchProgress:
    """Counts requests and generated tokens of a run; enter it to show them on stderr.

    Time left is by requests, at the pace of this run: those done before it do not count.

    Args:
        total: Requests.
        done: Of these, done before.
        shown: Otherwise it only counts.
    """

    def __init__(self, total: int, done: int, *, shown: bool = True) -> None:
        self._total = total
        self._is_shown = shown
        self._before = self._done = done
        self._tokens = 0
        self._started = self._shown = time.monotonic()
        self._bar = Progress(
            TextColumn("answering"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("requests · {task.fields[rate]} tokens/s ·"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
            disable=not (shown and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("", total=total, completed=done, rate="-")

    def __enter__(self) -> Self:
        self._started = self._shown = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._line()

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of this run by its wall time."""
        return self._tokens / max(time.monotonic() - self._started, 1e-9)

    def update(self, done: int, new_tokens: int) -> None:
        """Take note of requests answered in all, and of tokens drawn since the last call."""
        self._done = done
        self._tokens += new_tokens
        self._bar.update(self._task, completed=done, rate=f"{self.tokens_per_second:,.0f}")
        if self._bar.disable and time.monotonic() - self._shown >= LOG_SECONDS:
            self._line()

    def _line(self) -> None:
        if not self._is_shown:
            return
        self._shown = time.monotonic()
        text = f"{self._done} of {self._total} requests, {self.tokens_per_second:,.0f} tokens/s"
        answered = self._done - self._before
        if answered and self._done < self._total:
            left = (self._shown - self._started) / answered * (self._total - self._done)
            text += f", {_duration(left)} left"
        _log.info("%s", text)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
