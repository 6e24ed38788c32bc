"""Stopping cleanly: note the request, finish the step, save, say so."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_INTERRUPTED = 42


class Interrupted(Exception):
    """Raised by a job that was asked to stop, once everything is saved; its text says what the same command will do."""


class StopRequested:
    """Notes SIGTERM and SIGINT while entered, instead of dying of them.

    The second SIGINT is not held back: who presses Ctrl-C twice means it.

    Example:
        >>> with StopRequested() as stop:
        ...     for step in range(3):
        ...         if stop():
        ...             break
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether a stop has been requested."""
        return self._requested

    def __enter__(self) -> Self:
        """Takes the signals over; only the main thread of a process can."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.getsignal(number)
            signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
