"""A job's durable state: one object in the bucket, replaced only where nobody else has replaced it."""

from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from gcp import names
from gcp.job import JobSpec
from gcp.objects import Conflict, Objects
from qwq_jax.config.frozen import Frozen, describe

# resting: no resource, and none to be made before `not_before`. asked: the resource of this attempt is to exist.
# leaving: it is to be gone. over: it is, and no other will come.
Phase = Literal["resting", "asked", "leaving", "over"]
OutcomeKind = Literal["done", "bad-input", "failed", "cancelled", "deadline", "idle"]

# Events are for people; the record is read and written often.
_EVENTS = 200


class Staged(Frozen):
    """What the VMs install and run, by content.

    Attributes:
        agent: Object of the worker's agent.
        agent_sha256: Of it; the start script checks before it runs anything.
        wheel: Object of this package.
        lock: Object of the pinned requirements.
        files: Objects of the job's files, by their names in its working directory.
    """

    agent: str
    agent_sha256: str
    wheel: str
    lock: str
    files: dict[str, str]


class Interval(Frozen):
    """Chips held: what `cost` adds up."""

    attempt: int
    zone: str
    begin: float
    end: float | None = None


class Event(Frozen):
    """Something that happened, for `status`."""

    at: float
    text: str


class Outcome(Frozen):
    """How a run ended."""

    kind: OutcomeKind
    detail: str
    at: float


class Record(Frozen):
    """All that a launcher has to know to go on where another one was killed.

    Attributes:
        job: As submitted.
        uid: Of this run, a part of all names in the cloud.
        staged: What the VMs install and run.
        created: Time of the first `submit`; all times are seconds since 1970.
        deadline: When everything is deleted, done or not.
        owner: The launcher that acts; an older one sees another name here and stops.
        phase: See `Phase`.
        attempt: Number of the present or last resource; 0 before the first.
        zone_index: Which zone is used, or will be.
        next_zone_index: Which one is once the present resource is gone.
        created_resource: The resource of this attempt was seen or made, so that its absence means it is gone.
        asked_at: When this attempt was decided on.
        active_at: When its resource became active; None before.
        not_before: No resource is made earlier.
        preemptions: So far.
        failures: Of resources so far. The workers count those of the job.
        dry_zones: Zones in a row that had no room.
        intervals: Times for which chips were held.
        events: The newest ones.
    """

    job: JobSpec
    uid: str
    staged: Staged
    created: float
    deadline: float
    owner: str
    phase: Phase = "resting"
    attempt: int = 0
    zone_index: int = 0
    next_zone_index: int = 0
    created_resource: bool = False
    asked_at: float = 0.0
    active_at: float | None = None
    not_before: float = 0.0
    preemptions: int = 0
    failures: int = 0
    dry_zones: int = 0
    intervals: tuple[Interval, ...] = ()
    events: tuple[Event, ...] = ()
    outcome: Outcome | None = None

    @property
    def places(self) -> names.Places:
        """Where this run keeps things."""
        return names.Places(self.job.name, self.uid)

    @property
    def zone(self) -> str:
        """The zone of the present attempt, or of the next."""
        return self.job.zones[self.zone_index]

    @property
    def resource(self) -> str:
        """The name of this attempt's resource."""
        return self.places.resource(self.attempt)

    def changed(self, event: Event | None = None, **fields: object) -> "Record":
        """A copy with other values, and one more event."""
        if event is not None:
            fields["events"] = (*self.events, event)[-_EVENTS:]
        return self.model_copy(update=fields)

    def chips_returned(self, now: float) -> "Record":
        """A copy in which no interval is open."""
        ended = (each if each.end is not None else each.model_copy(update={"end": now}) for each in self.intervals)
        return self.model_copy(update={"intervals": tuple(ended)})


@dataclass(frozen=True)
class Saved:
    """A record, and the generation of the object that it was read from."""

    record: Record
    generation: int


def load(objects: Objects, job: str) -> Saved | None:
    """Reads the record of a job.

    Raises:
        ValueError: There is an object, but not of this program's making.
    """
    name = names.record(job)
    found = objects.get(name)
    if found is None:
        return None
    try:
        return Saved(Record.model_validate_json(found.data), found.generation)
    except ValidationError as error:
        raise ValueError(f"{name} was not written by this version: {describe(error)}") from None


def save(objects: Objects, record: Record, *, generation: int) -> Saved:
    """Replaces the record read at `generation`; 0 creates it.

    Raises:
        Conflict: Another launcher was faster.
    """
    data = record.model_dump_json(indent=1).encode()
    return Saved(record, objects.put(names.record(record.job.name), data, generation=generation))


def outcome(objects: Objects, record: Record) -> Outcome | None:
    """How the run ended, if it has."""
    found = objects.get(record.places.outcome)
    return None if found is None else Outcome.model_validate_json(found.data)


def conclude(objects: Objects, record: Record, ended: Outcome) -> Outcome:
    """Writes how the run ended, unless somebody has; returns what holds."""
    try:
        objects.put(record.places.outcome, ended.model_dump_json().encode(), generation=0)
    except Conflict:
        found = outcome(objects, record)
        assert found is not None, "outcomes are never deleted"
        return found
    return ended
