"""A bucket in memory, a clock that tests turn, and workers that need so many seconds for a job."""

import json
from dataclasses import dataclass, field

from gcp.job import JobSpec
from gcp.objects import Conflict, Object
from gcp.record import Record, Staged, save
from tests.gcp.world import Queued, World

STAGED = Staged(agent="agent.zip", agent_sha256="00", wheel="w.whl", lock="lock", files={})


def a_job(**changes: object) -> JobSpec:
    values = {
        "name": "job",
        "project": "p",
        "bucket": "gs://bucket",
        "verb": "generate",
        "topology": "v5e:2x2",
        "zones": ("a", "b"),
        "provisioning": "spot",
        "deadline_hours": 10.0,
    }
    return JobSpec.model_validate(values | changes)


def a_record(job: JobSpec | None = None, *, now: float = 1000.0, **changes: object) -> Record:
    job = job or a_job()
    record = Record(
        job=job, uid="abc123", staged=STAGED, created=now, deadline=now + job.deadline_hours * 3600, owner="first"
    )
    return record.changed(**changes)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 1000.0 + 3 * 86_400, "the story does not end"


@dataclass
class MemoryObjects:
    """With generations, as a bucket has them."""

    found: dict[str, Object] = field(default_factory=dict)
    written: int = 0

    def get(self, name: str) -> Object | None:
        return self.found.get(name)

    def put(self, name: str, data: bytes, *, generation: int | None = None) -> int:
        before = self.found.get(name)
        if generation is not None and generation != (before.generation if before else 0):
            raise Conflict(name)
        self.written += 1
        self.found[name] = Object(data, self.written)
        return self.written

    def list(self, prefix: str) -> dict[str, int]:
        return {name: len(each.data) for name, each in sorted(self.found.items()) if name.startswith(prefix)}


@dataclass
class Workers:
    """The VMs of all attempts of a job. Work that is done is kept, as checkpoints keep it.

    Attributes:
        objects: The job's bucket.
        world: Where they run.
        seconds: Of work until the job is done.
        mute: They boot and say nothing.
        saving: Seconds for which the job saves when it is stopped.
        done: Seconds of work so far.
        starts: Names of resources on which the job was started, each once.
    """

    objects: MemoryObjects
    world: World
    seconds: float = 3000.0
    mute: bool = False
    saving: float = 0.0
    done: float = 0.0
    starts: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    _last: dict[str, float] = field(default_factory=dict)
    _stopped: dict[str, float] = field(default_factory=dict)

    def __call__(self, queued: Queued, now: float) -> None:
        if self.mute:
            return
        told = json.loads(queued.node["metadata"]["qwq-jax-job"])
        outcome = f"{told['run']}/outcome.json"
        record = json.loads(self.objects.get(told["record"]).data)
        stale = (record["uid"], record["attempt"]) != (told["uid"], told["attempt"])
        if now >= told["deadline"] or self.objects.get(outcome) or stale:
            if now < self._stopped.setdefault(queued.name, now) + self.saving:
                return
            self.saved.append(queued.name)
            self.world.drop(queued.zone, queued.name)
            return
        if queued.name not in self._last:
            self.starts.append(queued.name)
        self.done += now - self._last.get(queued.name, now)
        self._last[queued.name] = now
        place = f"{told['run']}/attempts/{told['attempt']:04d}"
        self.objects.put(f"{place}/status-0000.json", json.dumps({"at": now}).encode())
        if self.done >= self.seconds:
            self.results.append("complete")
            ended = {"kind": "done", "detail": "all workers are done", "at": now}
            self.objects.put(outcome, json.dumps(ended).encode(), generation=0)


def submitted(objects: MemoryObjects, job: JobSpec, now: float) -> Record:
    record = a_record(job, now=now)
    save(objects, record, generation=0)
    return record
