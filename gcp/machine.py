"""What a launcher does next: a function of the record, of what was seen, and of the time. No network, no clock.

Every step first changes the record and only then the cloud, and what it does to the cloud may be done twice. So a
launcher that is killed anywhere is followed by another one that reads the record, looks, and goes on.
"""

from dataclasses import dataclass

from gcp.cloud import Refusal, Resource, State
from gcp.record import Event, Interval, Outcome, OutcomeKind, Record

# Seconds between looks at the cloud.
POLL = 15.0
# Seconds that a job has to save after the end of its run was decided on.
GRACE = 120.0
# Ends of a run that meet a running job, and how old a sign of life may be then: three signs were due meanwhile.
_STOPPING = ("cancelled", "deadline", "idle")
_LATELY = 90.0
# The first wait after a failure or preemption, doubled by each further one, and the longest.
FIRST_WAIT, LONGEST_WAIT = 10.0, 1800.0


@dataclass(frozen=True)
class Seen:
    """What was found outside.

    Attributes:
        resource: Of the present attempt.
        refusal: What the cloud answered when that resource was last asked for.
        detail: Its words.
        unanswered: Why the cloud did not say whether there is a resource; `resource` tells nothing then.
        made: The cloud took the request for that resource, though nobody has seen it since.
        outcome: Of the run, if it has ended.
        heard: When a worker of this attempt last gave a sign of life.
        ended: It said that its job has ended.
    """

    resource: Resource | None = None
    refusal: Refusal | None = None
    detail: str = ""
    unanswered: Refusal | None = None
    made: bool = False
    outcome: Outcome | None = None
    heard: float | None = None
    ended: bool = False


@dataclass(frozen=True)
class Create:
    """Ask for the resource of this attempt."""


@dataclass(frozen=True)
class Delete:
    """Delete the resource of this attempt."""


@dataclass(frozen=True)
class Conclude:
    """Write how the run ended; what is written then ends it."""

    kind: OutcomeKind
    detail: str


@dataclass(frozen=True)
class Wait:
    """Look again after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Stop:
    """Nothing is left to do."""


Action = Create | Delete | Conclude | Wait | Stop


@dataclass(frozen=True)
class Step:
    """The record as it has to be saved, if it changed, before the action is done."""

    record: Record
    action: Action


def decide(record: Record, seen: Seen, now: float) -> Step:
    """Chooses the next step of a run."""
    if record.phase == "over":
        return Step(record, Stop())
    if seen.outcome is None and now >= record.deadline:
        return Step(record, Conclude("deadline", f"{record.job.deadline_hours:g} hours are over"))
    match record.phase:
        case "resting":
            return _resting(record, seen, now)
        case "asked":
            return _asked(record, seen, now)
        case "leaving":
            return _leaving(record, seen, now)


def back_off(count: int) -> float:
    """Seconds to wait after the `count`-th trouble of a kind."""
    return min(FIRST_WAIT * 2.0 ** min(max(count - 1, 0), 16), LONGEST_WAIT)


def _resting(record: Record, seen: Seen, now: float) -> Step:
    if seen.outcome is not None:
        return Step(_over(record, seen.outcome, now), Stop())
    if now < record.not_before:
        return Step(record, Wait(min(POLL, record.not_before - now)))
    attempt = record.attempt + 1
    event = Event(at=now, text=f"attempt {attempt}: {record.places.resource(attempt)} in {record.zone}")
    asked = record.changed(event, phase="asked", attempt=attempt, created_resource=False, asked_at=now, active_at=None)
    return Step(asked, Wait(0.0))


def _asked(record: Record, seen: Seen, now: float) -> Step:
    if seen.outcome is not None:
        return Step(_left(record, now, f"ended: {seen.outcome.kind}"), Wait(0.0))
    if seen.unanswered is not None:
        return _unanswered(record, seen, now)
    resource = seen.resource
    if resource is None:
        return _absent(record, seen, now)
    if not record.created_resource:
        record = record.changed(created_resource=True)
    match resource.state:
        case State.LOST:
            return _preempted(record, now, resource.detail)
        case State.FAILED:
            return _refused(record, resource.refusal or Refusal.BAD_REQUEST, resource.detail, now)
        case State.DELETING:
            return _preempted(record, now, "deleted by somebody else")
        case State.WAITING:
            waited = now - record.asked_at
            if waited > record.job.wait_minutes * 60 and len(record.job.zones) > 1:
                text = f"no room after {record.job.wait_minutes:g} minutes in the queue of {record.zone}"
                return _refused(record, Refusal.STOCK_OUT, text, now)
            return Step(record, Wait(POLL))
        case State.ACTIVE:
            return _active(record, seen, now)


def _unanswered(record: Record, seen: Seen, now: float) -> Step:
    """Nothing is made or deleted unseen: there may be a resource."""
    if seen.unanswered is not Refusal.BAD_REQUEST or record.created_resource or seen.made:
        # One that may be there is not given up because this launcher lost a permission; it gives up looking, in time.
        return Step(record, Wait(POLL))
    if seen.outcome is None:
        return Step(record, Conclude("bad-input", seen.detail))
    return Step(_over(record, seen.outcome, now), Stop())


def _absent(record: Record, seen: Seen, now: float) -> Step:
    if record.created_resource:
        return _preempted(record, now, "gone")
    match seen.refusal:
        case None:
            return Step(record, Create())
        case Refusal.TRANSIENT:
            # It may have been made all the same: the same name is asked for again, after a look.
            return Step(record, Wait(POLL))
        case Refusal.BAD_REQUEST:
            return Step(record, Conclude("bad-input", seen.detail))
        case refusal:
            return _refused(record, refusal, seen.detail, now)


def _active(record: Record, seen: Seen, now: float) -> Step:
    if record.active_at is None:
        interval = Interval(attempt=record.attempt, zone=record.zone, begin=now)
        record = record.changed(
            Event(at=now, text=f"attempt {record.attempt}: active"),
            active_at=now,
            dry_zones=0,
            intervals=(*record.intervals, interval),
        )
    assert record.active_at is not None
    silent = now - max(record.active_at, seen.heard or 0.0)
    # The agent on the VM ends a job that hangs; this is for VMs whose agent never came up, or died.
    limit = max(record.job.boot_minutes, record.job.idle_minutes if seen.heard else 0.0) * 60
    if silent > limit:
        return _failed(record, f"no sign of its workers for {silent / 60:.0f} minutes", now)
    return Step(record, Wait(POLL))


def _leaving(record: Record, seen: Seen, now: float) -> Step:
    if seen.unanswered is not None:
        return _unanswered(record, seen, now)
    if seen.resource is not None:
        wait = POLL if seen.resource.state is State.DELETING else min(POLL, _grace(seen, now))
        return Step(record, Wait(wait) if wait > 0 else Delete())
    record = record.chips_returned(now)
    if seen.outcome is not None:
        return Step(_over(record, seen.outcome, now), Stop())
    if record.preemptions > record.job.preemptions:
        return Step(
            record, Conclude("failed", f"preempted {record.preemptions} times; {record.job.preemptions} are borne")
        )
    if record.failures > record.job.failures:
        last = next((e.text for e in reversed(record.events) if "failed" in e.text), "")
        return Step(record, Conclude("failed", f"{record.failures} failures; {record.job.failures} are borne ({last})"))
    return Step(record.changed(phase="resting", zone_index=record.next_zone_index), Wait(0.0))


def _grace(seen: Seen, now: float) -> float:
    """Seconds for which the job may still save: its agent sees the outcome, and deletes the resource when it has."""
    outcome, resource = seen.outcome, seen.resource
    if outcome is None or outcome.kind not in _STOPPING or resource is None or resource.state is not State.ACTIVE:
        return 0.0
    if seen.ended or seen.heard is None or seen.heard < outcome.at - _LATELY:
        return 0.0
    return outcome.at + GRACE - now


def _preempted(record: Record, now: float, detail: str) -> Step:
    count = record.preemptions + 1
    left = _left(record, now, f"preempted ({detail})", preemptions=count, not_before=now + back_off(count))
    return Step(left, Wait(0.0))


def _failed(record: Record, detail: str, now: float) -> Step:
    count = record.failures + 1
    left = _left(record, now, f"failed ({detail})", failures=count, not_before=now + back_off(count))
    return Step(left, Wait(0.0))


def _refused(record: Record, refusal: Refusal, detail: str, now: float) -> Step:
    match refusal:
        case Refusal.STOCK_OUT | Refusal.QUOTA:
            # Nobody's fault, and no budget: the next zone at once, and all of them again after a while.
            dry = record.dry_zones + 1
            rounds = dry // len(record.job.zones)
            wait = back_off(rounds) if dry % len(record.job.zones) == 0 else 0.0
            text = f"{refusal.value} in {record.zone} ({detail})"
            following = (record.zone_index + 1) % len(record.job.zones)
            left = _left(record, now, text, dry_zones=dry, next_zone_index=following, not_before=now + wait)
            return Step(left, Wait(0.0))
        case Refusal.NAME_TAKEN:
            # Not ours, or it would have been seen: this attempt's name is blocked, and the next one has another.
            return _failed(record, f"the name {record.resource} is taken", now)
        case _:
            return _failed(record, detail, now)


def _left(record: Record, now: float, text: str, **fields: object) -> Record:
    event = Event(at=now, text=f"attempt {record.attempt}: {text}")
    return record.changed(event, phase="leaving", **fields)


def _over(record: Record, outcome: Outcome, now: float) -> Record:
    event = Event(at=now, text=f"over: {outcome.kind}, {outcome.detail}")
    return record.changed(event, phase="over", outcome=outcome)
