"""The one thread that calls the engine.  Commands go in and reports come out; nothing is shared."""

import queue
from collections.abc import Callable
from dataclasses import dataclass

from qwq_jax.engine.engine import Engine, StepOutput
from qwq_jax.engine.request import HooksFactory, Request


@dataclass(frozen=True)
class Submit:
    """Take these requests, or none of them."""

    group: str
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Cancel:
    """Forget these requests, and free what they hold."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True)
class Admitted:
    """The engine took the requests of a group."""

    group: str


@dataclass(frozen=True)
class Refused:
    """The engine can never serve a group, and why."""

    group: str
    error: ValueError


@dataclass(frozen=True)
class Load:
    """How full the engine is: sequences with and without a row, pages that nobody has, steps since the start."""

    waiting: int
    running: int
    free_pages: int
    steps: int


@dataclass(frozen=True)
class Report:
    """What happened since the last one."""

    verdicts: tuple[Admitted | Refused, ...]
    output: StepOutput
    load: Load


class EngineWorker:
    """Steps the engine while it has work, and sleeps while it has none.

    Args:
        engine: Called from `run` alone.
        hooks: What watches the text of each sample.
        post: Called with each report, on the thread of `run`.
    """

    def __init__(self, engine: Engine, hooks: HooksFactory, post: Callable[[Report], None]) -> None:
        self._engine = engine
        self._hooks = hooks
        self._post = post
        self._commands: queue.SimpleQueue[Submit | Cancel | None] = queue.SimpleQueue()

    def submit(self, group: str, requests: tuple[Request, ...]) -> None:
        """From any thread: puts requests in line; `Admitted` or `Refused` follows."""
        self._commands.put(Submit(group, requests))

    def cancel(self, request_ids: tuple[str, ...]) -> None:
        """From any thread: takes requests out, wherever they are; no report of them follows the next one."""
        self._commands.put(Cancel(request_ids))

    def stop(self) -> None:
        """From any thread: ends `run`, whatever is in flight."""
        self._commands.put(None)

    def run(self) -> None:
        """Serves until `stop`; an error of the engine ends it and is the caller's."""
        while True:
            verdicts: list[Admitted | Refused] = []
            commands = self._next_commands()
            for command in commands:
                if command is None:
                    return
                if isinstance(command, Cancel):
                    self._cancel(command.request_ids)
                else:
                    verdicts.append(self._admit(command))
            if verdicts:
                # A prompt's first step may take long; who asked need not wait for it to hear that it was taken.
                self._post(Report(tuple(verdicts), StepOutput(), self._load()))
            output = self._engine.step() if self._engine.busy else StepOutput()
            self._post(Report((), output, self._load()))

    def _next_commands(self) -> list[Submit | Cancel | None]:
        """All that have come; waits for one if there is nothing else to do."""
        commands = [] if self._engine.busy else [self._commands.get()]
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def _admit(self, command: Submit) -> Admitted | Refused:
        try:
            for request in command.requests:
                self._engine.check(request)
            for request in command.requests:
                self._engine.add(request, self._hooks)
        except ValueError as error:
            self._cancel(tuple(request.request_id for request in command.requests))
            return Refused(command.group, error)
        return Admitted(command.group)

    def _cancel(self, request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            self._engine.cancel(request_id)

    def _load(self) -> Load:
        scheduler = self._engine.scheduler
        return Load(scheduler.waiting, scheduler.running, sum(scheduler.free_pages), self._engine.stats.steps)
