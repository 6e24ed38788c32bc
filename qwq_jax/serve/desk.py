"""Lets requests in or turns them away, and hands each its tokens.  Lives on the event loop's thread.

A request is let in while fewer sequences are in flight than the engine has rows plus `max_waiting`, and fewer than
`max_waiting` wait where pages rather than rows are short.  So a full line is at most `max_waiting` requests long, and
whatever was let in is answered.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from qwq_jax.engine.request import Completion, NewToken, Request
from qwq_jax.serve.errors import ApiError, invalid, overloaded, shutting_down
from qwq_jax.serve.metrics import ServerMetrics
from qwq_jax.serve.worker import Admitted, Load, Report

Event = NewToken | Completion

_RATE_SECONDS = 60.0
_LONGEST_RETRY_SECONDS = 3600


class Commands(Protocol):
    """What the desk asks of the engine's thread."""

    def submit(self, group: str, requests: tuple[Request, ...]) -> None:
        """Puts requests in line."""
        ...

    def cancel(self, request_ids: tuple[str, ...]) -> None:
        """Takes requests out."""
        ...


@dataclass(eq=False)
class Ticket:
    """One call that was let in: a context that gives its place back, and takes from the engine what still runs.

    >>> with desk.ticket("chatcmpl-1") as ticket:
    ...     await ticket.submit(requests)
    ...     async for events in ticket.batches():
    ...         ...
    """

    desk: "Desk"
    name: str
    arrived: float
    open: int = 1
    """Sequences that have not ended."""
    _requests: tuple[Request, ...] = ()
    _inbox: "asyncio.Queue[list[Event] | Admitted | ApiError]" = field(default_factory=asyncio.Queue)
    _last: dict[tuple[str, int], float] = field(default_factory=dict)
    _began: bool = False

    async def submit(self, requests: tuple[Request, ...]) -> None:
        """Hands the requests to the engine and waits until it took them; ApiError if it refuses."""
        self._requests = requests
        self.open = sum(request.params.n for request in requests)
        self.desk.submit(self, requests)
        verdict = await self._inbox.get()
        if isinstance(verdict, ApiError):
            raise verdict
        assert isinstance(verdict, Admitted), "tokens come after the verdict"

    async def batches(self, *, pause: float | None = None) -> AsyncIterator[list[Event]]:
        """Tokens and completions as they come, until all sequences have ended; ApiError if they cannot.

        Args:
            pause: After this many seconds without any, an empty batch says that nothing has come.
        """
        while self.open or not self._inbox.empty():
            try:
                events = await asyncio.wait_for(self._inbox.get(), pause)
            except TimeoutError:
                yield []
                continue
            batch: list[Event] = []
            while True:
                if isinstance(events, ApiError):
                    raise events
                assert not isinstance(events, Admitted), "a verdict comes once"
                batch += events
                if self._inbox.empty():
                    break
                events = self._inbox.get_nowait()
            yield batch

    def take(self, events: list[Event], now: float) -> int:
        """Notes what a step brought; returns how many sequences ended."""
        ended = sum(isinstance(event, Completion) for event in events)
        self.open -= ended
        self._measure(events, now)
        self._inbox.put_nowait(events)
        return ended

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompts."""
        return sum(len(request.prompt_token_ids) for request in self._requests)

    def tell(self, verdict: Admitted | ApiError) -> None:
        """Passes on that the engine took the requests, or that there will be no answer."""
        self._inbox.put_nowait(verdict)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.desk.close(self, self._requests)

    def _measure(self, events: list[Event], now: float) -> None:
        counts: dict[tuple[str, int], int] = {}
        for event in events:
            if isinstance(event, NewToken):
                key = (event.request_id, event.index)
                counts[key] = counts.get(key, 0) + 1
        metrics = self.desk.metrics
        metrics.tokens(sum(counts.values()))
        if counts and not self._began:
            self._began = True
            metrics.first_token(now - self.arrived)
        for key, count in counts.items():
            if key in self._last:
                metrics.between_tokens(now - self._last[key], count)
            self._last[key] = now


class Desk:
    """The tickets that are out.

    Args:
        commands: The engine's thread.
        metrics: Counts what passes.
        rows: Sequences that the engine runs at once.
        max_waiting: Requests beyond these.
    """

    def __init__(self, commands: Commands, metrics: ServerMetrics, *, rows: int, max_waiting: int) -> None:
        self.metrics = metrics
        self._commands = commands
        self._rows = rows
        self._max_waiting = max_waiting
        self._tickets: dict[str, Ticket] = {}
        self._by_request: dict[str, Ticket] = {}
        self._load = Load(0, 0, 0, 0)
        self._closed: ApiError | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._busy_since = 0.0
        self._ended: deque[float] = deque()

    @property
    def closed(self) -> ApiError | None:
        """Why nothing is let in any more."""
        return self._closed

    @property
    def in_flight(self) -> int:
        """Sequences that were let in and have not ended."""
        return sum(ticket.open for ticket in self._tickets.values())

    @property
    def waiting(self) -> int:
        """Sequences that wait: for a row, or for pages as the engine last said."""
        return max(self.in_flight - self._rows, self._load.waiting, 0)

    def ticket(self, name: str) -> Ticket:
        """Lets a call in; ApiError 429 if the line is full, 503 if the server is closing."""
        if self._closed is not None:
            raise self._closed
        line_is_full = self.in_flight >= self._rows + self._max_waiting
        if line_is_full or self._load.waiting > self._max_waiting:
            raise overloaded(self.retry_after(time.monotonic()))
        if not self._tickets:
            self._busy_since = time.monotonic()
            self._ended.clear()
        ticket = self._tickets[name] = Ticket(self, name, time.monotonic())
        self._idle.clear()
        return ticket

    def retry_after(self, now: float) -> int:
        """Seconds in which the line is worked off at the pace of the last minute, at least 1.

        Before anything has ended, as long again as the server has been busy: who has seen half of a wait on average
        sees the other half.
        """
        self._forget(now - _RATE_SECONDS)
        busy = now - self._busy_since
        if not self._ended:
            seconds = busy
        else:
            seconds = (self.waiting + 1) * min(busy, _RATE_SECONDS) / len(self._ended)
        return max(1, min(math.ceil(seconds), _LONGEST_RETRY_SECONDS))

    def submit(self, ticket: Ticket, requests: tuple[Request, ...]) -> None:
        """Puts a ticket's requests in the engine's line."""
        for request in requests:
            self._by_request[request.request_id] = ticket
        self._commands.submit(ticket.name, requests)

    def close(self, ticket: Ticket, requests: tuple[Request, ...]) -> None:
        """Takes a ticket back, and its requests from the engine if they have not ended."""
        del self._tickets[ticket.name]
        for request in requests:
            del self._by_request[request.request_id]
        if requests and ticket.open:
            self._commands.cancel(tuple(request.request_id for request in requests))
        if not self._tickets:
            self._idle.set()

    def dispatch(self, report: Report) -> None:
        """Hands out what the engine's thread reports."""
        now = time.monotonic()
        self._load = report.load
        self.metrics.load(report.load)
        for verdict in report.verdicts:
            ticket = self._tickets.get(verdict.group)
            if ticket is None:
                continue
            if isinstance(verdict, Admitted):
                self.metrics.prompt_tokens(ticket.prompt_tokens)
                ticket.tell(verdict)
            else:
                ticket.tell(invalid(verdict.error, {}))
        batches: dict[Ticket, list[Event]] = {}
        for event in (*report.output.tokens, *report.output.completions):
            ticket = self._by_request.get(event.request_id)
            if ticket is not None:
                batches.setdefault(ticket, []).append(event)
        for ticket, events in batches.items():
            self._ended.extend([now] * ticket.take(events, now))
        self._forget(now - _RATE_SECONDS)

    def _forget(self, before: float) -> None:
        """Drops the ends that are too old to say how fast things go."""
        while self._ended and self._ended[0] < before:
            self._ended.popleft()

    def refuse(self, why: ApiError) -> None:
        """Lets nothing in from now on."""
        self._closed = why

    def fail(self, why: ApiError) -> None:
        """Ends all that is in flight; what has its last token only has to be sent."""
        for ticket in self._tickets.values():
            if ticket.open:
                ticket.tell(why)

    async def drained(self) -> None:
        """Waits until nothing is in flight."""
        await self._idle.wait()

    async def drain(self, seconds: float, hurry: asyncio.Event) -> None:
        """Lets nothing in, and gives what runs some time to end, less if `hurry` is set."""
        self.refuse(shutting_down())
        waits = [asyncio.ensure_future(self.drained()), asyncio.ensure_future(hurry.wait())]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self.fail(shutting_down())
