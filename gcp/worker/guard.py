"""When a VM has to stop, decided on the VM: the laptop that started it may be gone."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from gcp.worker.assignment import Assignment
from gcp.worker.google import Conflict, Google


class Reason(Enum):
    """Why."""

    OVER = "the run is over"
    SUPERSEDED = "another attempt is wanted"
    PREEMPTED = "this VM is being taken away"
    SIGNALLED = "this VM is being shut down"


@dataclass(frozen=True)
class Stop:
    """The order to stop.

    Attributes:
        reason: Why.
        delete: Whether the resource goes too. It does, except in a shutdown, which may be followed by a boot.
    """

    reason: Reason
    delete: bool = True


def conclude(google: Google, assignment: Assignment, kind: str, detail: str, now: float) -> None:
    """Writes how the run ended, unless somebody has."""
    ended = json.dumps({"kind": kind, "detail": detail, "at": now})
    try:
        google.put(assignment.outcome, ended.encode(), only_new=True)
    except Conflict:
        pass


class Guard:
    """Looks, at most every `period` seconds, for a reason to stop.

    A bucket that does not answer is no reason; the deadline is one without any bucket.
    """

    def __init__(self, google: Google, assignment: Assignment, *, clock: Callable[[], float], period: float) -> None:
        self._google = google
        self._assignment = assignment
        self._clock = clock
        self._period = period
        self._next = 0.0
        self._grown = (-1, clock())
        self.signalled = False

    def look(self, log_size: "int | None") -> "Stop | None":
        """Returns a reason to stop, if there is one.

        Args:
            log_size: Of the running job; a job whose log does not grow hangs. None while none runs.
        """
        now = self._clock()
        if self.signalled:
            return Stop(Reason.SIGNALLED, delete=False)
        if now >= self._assignment.deadline:
            self._end("deadline", "the deadline has passed", now)
            return Stop(Reason.OVER)
        if log_size is None or log_size != self._grown[0]:
            self._grown = (-1 if log_size is None else log_size, now)
        elif now - self._grown[1] >= self._assignment.idle_seconds:
            self._end("idle", f"nothing was logged for {self._assignment.idle_seconds / 60:g} minutes", now)
            return Stop(Reason.OVER)
        if now < self._next:
            return None
        self._next = now + self._period
        try:
            return self._outside()
        except (OSError, ValueError):
            return None

    def _outside(self) -> "Stop | None":
        if (self._google.metadata("instance/preempted") or "").strip().upper() == "TRUE":
            return Stop(Reason.PREEMPTED)
        if self._google.get(self._assignment.outcome) is not None:
            return Stop(Reason.OVER)
        found = self._google.get(self._assignment.record)
        if found is not None:
            record = json.loads(found)
            if (record["uid"], record["attempt"]) != (self._assignment.uid, self._assignment.attempt):
                return Stop(Reason.SUPERSEDED)
        return None

    def _end(self, kind: str, detail: str, now: float) -> None:
        try:
            conclude(self._google, self._assignment, kind, detail, now)
        except OSError:
            pass  # the launcher sees the time too
