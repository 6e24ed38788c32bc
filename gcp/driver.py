"""The launcher's loop: read the record, look, decide, write the record, act. Killed anywhere, the next one goes on."""

import base64
import json
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from google.auth.exceptions import GoogleAuthError

from gcp import names
from gcp import record as records
from gcp.cloud import Cloud, Refusal, Refused, Request, Resource, State
from gcp.gcloud import GcloudCloud
from gcp.job import DISTRIBUTED
from gcp.machine import GRACE, POLL, Action, Conclude, Create, Delete, Seen, Step, Stop, Wait, back_off, decide
from gcp.objects import Conflict, Objects, Unavailable
from gcp.record import Outcome, Record, Saved
from gcp.worker.assignment import Assignment
from gcp.worker.guard import Reason

T = TypeVar("T")

# Seconds for which a permission that was lost is waited for, and a bucket that did not answer even once.
PATIENCE = 1800.0
# What a worker says of itself when its job has ended.
_ENDED = frozenset(reason.value for reason in Reason)


class TakenOver(Exception):
    """Another launcher drives this job now."""


class OutOfSight(Exception):
    """The job may go on, and this launcher cannot look after it any more; says what is left, and what ends it."""


@dataclass
class Launcher:
    """Drives one job to its end.

    Attributes:
        objects: The job's bucket.
        cloud: Where resources are made.
        owner: Of this launcher, unlike all others.
        boot: Text of the start script.
        clock: Seconds since 1970.
        sleep: Waits.
        say: Told of every event.
    """

    objects: Objects
    cloud: Cloud
    owner: str
    boot: str
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    say: Callable[[str], None]
    _refused: dict[str, Refused] = field(default_factory=dict)
    _outage: float = 0.0
    # The last resource that the cloud took a request for.
    _asked_for: str = ""
    # Since when each kind of call has been forbidden, for each resource.
    _forbidden: dict[tuple[str, str], float] = field(default_factory=dict)

    def drive(self, job: str) -> Record:
        """Runs until the job is over and no resource of it is left.

        Raises:
            TakenOver: Another launcher came.
            OutOfSight: A permission was lost while the job had a resource, and did not come back for `PATIENCE`.
            ValueError: The bucket has no such job.
            Unavailable: The bucket did not answer at first for `PATIENCE`, or later until the deadline.
        """
        known, failures = self.patiently(job, lambda: self._take(job)), 0
        while True:
            try:
                saved = self._load(job)
                known = saved.record
                if known.owner != self.owner:
                    raise TakenOver(f"{job} is driven by another launcher now; `watch` shows how it goes")
                action = self._step(saved)
                if isinstance(action, Stop):
                    ended = self._load(job).record
                    if self._sweep(ended):
                        return ended
                    action = Wait(POLL)
                failures = 0
            except Unavailable as error:
                failures += 1
                action = self._without_bucket(known, failures, error)
            except (OSError, GoogleAuthError) as error:
                # Not of the network's kind: the bucket, or the whole login, is forbidden from now on.
                if known.phase not in ("asked", "leaving") or not self._made(known):
                    raise
                self.say(f"waiting: {error}")
                self._forbid("bucket", known, str(error))
                action = Wait(POLL)
            else:
                self._forbidden.pop(("bucket", known.resource), None)
            if isinstance(action, Wait) and action.seconds:
                self.sleep(action.seconds)

    def patiently(self, job: str, call: Callable[[], T]) -> T:
        """Makes a first call to the bucket, again and again while that does not answer.

        Raises:
            Unavailable: It did not for `PATIENCE`.
        """
        begin, failures = self.clock(), 0
        while True:
            try:
                return call()
            except Unavailable as error:
                failures += 1
                left = begin + PATIENCE - self.clock()
                if left <= 0:
                    raise Unavailable(
                        f"{error}, nor did it for {PATIENCE / 60:.0f} minutes: whether job {job} runs is not known, "
                        "and this launcher did nothing about it; `watch` takes it up when the bucket answers"
                    ) from None
                self.say(f"waiting: {error}")
                self.sleep(min(back_off(failures), left))

    def _without_bucket(self, known: Record, failures: int, error: Unavailable) -> Wait:
        """Waits for the bucket until the deadline; then what is known to be there is deleted without it."""
        self._outage = self.clock()
        left = known.deadline + GRACE - self._outage
        if left > 0:
            self.say(f"waiting: {error}")
            return Wait(min(back_off(failures), left))
        if known.phase not in ("asked", "leaving"):
            raise error
        try:
            if self.cloud.get(known.zone, known.resource) is None:
                raise error
            self.say(f"deleting {known.resource}: the deadline has passed")
            self.cloud.delete(known.zone, known.resource)
        except Refused as refused:
            self.say(f"{known.resource}: {refused}")
        return Wait(POLL)

    def _step(self, saved: Saved) -> Action:
        """Decides once, saves, acts. A record that somebody else replaced meanwhile is read again."""
        step = decide(saved.record, self._look(saved.record), self.clock())
        try:
            self._save(saved, step)
        except Conflict:
            return Wait(0.0)
        self._act(step)
        return step.action

    def _load(self, job: str) -> Saved:
        saved = records.load(self.objects, job)
        if saved is None:
            raise ValueError(f"there is no job {job} in this bucket")
        return saved

    def _take(self, job: str) -> Record:
        """Writes this launcher's name into the record; the one that was there stops when it sees it."""
        while True:
            saved = self._load(job)
            mine = saved.record.changed(owner=self.owner)
            try:
                return records.save(self.objects, mine, generation=saved.generation).record
            except Conflict:
                continue

    def _made(self, record: Record) -> bool:
        """Whether there may be a resource of this attempt."""
        return record.created_resource or record.resource == self._asked_for

    def _forbid(self, call: str, record: Record, detail: str, stray: Resource | None = None) -> None:
        """Notes that a kind of call is forbidden, and gives up when it has been for too long.

        Nothing is deleted: it is this launcher that lost a permission, and the VMs' own account ends the job in time.

        Args:
            call: Its kind.
            record: Of the job.
            detail: Why.
            stray: What was to be deleted, where that is not the resource of this attempt.

        Raises:
            OutOfSight: It has.
        """
        key = call, stray.name if stray else record.resource
        if self.clock() - self._forbidden.setdefault(key, self.clock()) < PATIENCE:
            return
        job, at = record.job, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.deadline))
        since = f"job {job.name} cannot be looked after, for {PATIENCE / 60:.0f} minutes now: {detail}"
        if job.vm:
            raise OutOfSight(f"{since}; VM {job.vm} may still run it, until {at}, and `watch` takes it up again")
        name, zone = (stray.name, stray.zone) if stray else (record.resource, record.zone)
        command = shlex.join(GcloudCloud(job.project).delete_command(zone, name))
        raise OutOfSight(
            f"{since}; {name} in {zone} may still run, and its VMs delete it at {at}; `watch` takes it up when the "
            f"permission is back, and this deletes it: {command}"
        )

    def _look(self, record: Record) -> Seen:
        outcome = records.outcome(self.objects, record)
        if record.phase not in ("asked", "leaving"):
            return Seen(outcome=outcome)
        try:
            resource = self.cloud.get(record.zone, record.resource)
        except Refused as refused:
            self.say(f"{record.resource}: {refused}")
            made = self._made(record)
            if made and refused.reason is Refusal.BAD_REQUEST:
                self._forbid("look", record, refused.detail)
            return Seen(unanswered=refused.reason, detail=refused.detail, made=made, outcome=outcome)
        self._forbidden.pop(("look", record.resource), None)
        heard, ended = None, False
        if resource is not None and resource.state is State.ACTIVE:
            found = self.objects.get(record.places.status(record.attempt))
            if found is not None:
                status = json.loads(found.data)
                heard, ended = float(status["at"]), status.get("state") in _ENDED
            if self._outage:
                # Workers cannot be heard through a bucket that is away, and need a while when it is back.
                heard = max(heard or 0.0, self._outage)
        refused = self._refused.pop(record.resource, None)
        return Seen(
            resource=resource,
            refusal=refused.reason if refused else None,
            detail=refused.detail if refused else "",
            outcome=outcome,
            heard=heard,
            ended=ended,
        )

    def _save(self, saved: Saved, step: Step) -> None:
        if step.record == saved.record:
            return
        records.save(self.objects, step.record, generation=saved.generation)
        for event in step.record.events[-1:] if step.record.events != saved.record.events else ():
            self.say(event.text)

    def _act(self, step: Step) -> None:
        record, action = step.record, step.action
        try:
            match action:
                case Create():
                    self._sweep(record)
                    self.cloud.create(request(record, boot=self.boot, now=self.clock()))
                    self._asked_for = record.resource
                case Delete():
                    self.cloud.delete(record.zone, record.resource)
                    self._forbidden.pop(("delete", record.resource), None)
                case Conclude():
                    ended = Outcome(kind=action.kind, detail=action.detail, at=self.clock())
                    records.conclude(self.objects, record, ended)
                case _:
                    pass
        except Refused as refused:
            self.say(f"{record.resource}: {refused}")
            self._refused[record.resource] = refused
            if isinstance(action, Delete):
                if refused.reason is Refusal.BAD_REQUEST:
                    self._forbid("delete", record, refused.detail)
                self.sleep(POLL)

    def _sweep(self, record: Record) -> bool:
        """Deletes what earlier attempts of this run left, and says whether nothing was.

        There is such a thing if a launcher slept between writing the record and asking, while another one went on.

        Raises:
            OutOfSight: It may not be deleted, and has not been for too long.
        """
        clean = True
        for zone in dict.fromkeys(record.job.zones):
            stray = None
            try:
                for stray in self._strays(record, zone):
                    clean = False
                    if stray.state is not State.DELETING:
                        self.say(f"deleting {stray.name} in {zone}, which an earlier attempt left")
                        self.cloud.delete(zone, stray.name)
                        self._forbidden.pop(("sweep", stray.name), None)
            except Refused as refused:
                self.say(f"{zone}: {refused}")
                if stray is not None and refused.reason is Refusal.BAD_REQUEST:
                    self._forbid("sweep", record, refused.detail, stray)
                # A zone that refuses for good, such as one that does not exist, is not waited for.
                clean = clean and refused.reason is Refusal.BAD_REQUEST
        return clean

    def _strays(self, record: Record, zone: str) -> list[Resource]:
        ours = record.places.resource(0).removesuffix("0")
        found = {each: each.name.removeprefix(ours) for each in self.cloud.list(zone) if each.name.startswith(ours)}
        # A later attempt is none of ours to judge: this launcher may be the one that slept.
        past = record.attempt + (record.phase == "over")
        return [each for each, number in found.items() if number.isdecimal() and int(number) < past]


def request(record: Record, *, boot: str, now: float) -> Request:
    """What the cloud is asked for in this attempt."""
    job = record.job
    # Bounds the wait only; what runs is ended by the agent and the launcher.
    valid = max(record.deadline - now, 60.0)
    metadata = {
        "startup-script": boot,
        "qwq-jax-agent": f"{job.bucket.removeprefix('gs://')}/{record.staged.agent}",
        "qwq-jax-agent-sha256": record.staged.agent_sha256,
        # For the start script, should no agent come up to end the VM.
        "qwq-jax-deadline": f"{math.ceil(record.deadline)}",
        "qwq-jax-resource": _path(record),
        "qwq-jax-job": assignment(record).to_json(),
    }
    return Request(
        name=record.resource,
        zone=record.zone,
        accelerator_type=job.slice.accelerator_type,
        runtime=job.runtime_version or job.slice.runtime,
        slices=job.slices,
        provisioning=job.provisioning,
        valid_seconds=int(valid),
        metadata=metadata,
        labels={"qwq-jax-job": job.name},
        topology=None if job.slice.is_usual else job.slice.shape_text,
        reservation=job.reservation,
        service_account=job.service_account,
        network=job.network,
        subnetwork=job.subnetwork,
        external_ips=job.external_ips,
    )


def _path(record: Record) -> str:
    """The resource in the words of the TPU API; empty for a VM that is its owner's."""
    job = record.job
    return "" if job.vm else f"projects/{job.project}/locations/{record.zone}/queuedResources/{record.resource}"


def assignment(record: Record) -> Assignment:
    """What the VMs of this attempt are told."""
    job, staged, places = record.job, record.staged, record.places
    distributed = job.verb in DISTRIBUTED and job.hosts > 1
    return Assignment(
        project=job.project,
        zone=record.zone,
        resource="" if job.vm else record.resource,
        bucket=job.bucket.removeprefix("gs://"),
        record=names.record(job.name),
        run=places.run,
        uid=record.uid,
        attempt=record.attempt,
        deadline=record.deadline,
        idle_seconds=job.idle_minutes * 60,
        failures=job.failures,
        preemptions=job.preemptions,
        command=[job.verb, *job.arguments, *(["--distributed"] if distributed else [])],
        distributed=distributed,
        agent=staged.agent,
        wheel=staged.wheel,
        lock=staged.lock,
        files=staged.files,
        results=list(job.results),
        environment=job.environment,
        apt_packages=list(job.apt_packages),
        compile_cache=names.compile_cache(job.bucket, job.slice.accelerator_type),
        cpu=job.slice.generation == "cpu",
    )


@dataclass(frozen=True)
class ExistingVm:
    """A TPU VM that is its owner's, in the place of a queued resource: started by ssh, and never deleted.

    Objects beside those of the attempt say that its agents were started, and that they are to be taken for gone.
    """

    vm: str
    gcloud: GcloudCloud
    objects: Objects
    record: Callable[[], Record]

    def get(self, zone: str, name: str) -> Resource | None:
        """Whether this attempt runs on the VM."""
        record = self.record()
        places, number = record.places, record.attempt
        if self.objects.get(places.vm_started(number)) is None or self.objects.get(places.vm_left(number)) is not None:
            return None
        word = self.gcloud.node_state(zone, self.vm) or "DELETED"
        return Resource(name, zone, State.ACTIVE if word == "READY" else State.LOST, word)

    def list(self, zone: str) -> list[Resource]:
        """None that could be left over."""
        return []

    def create(self, request: Request) -> None:
        """Runs the start script on all workers; where an agent runs already the second one ends."""
        given = {
            "QWQ_JAX_AGENT": request.metadata["qwq-jax-agent"],
            "QWQ_JAX_AGENT_SHA256": request.metadata["qwq-jax-agent-sha256"],
            "QWQ_JAX_DEADLINE": request.metadata["qwq-jax-deadline"],
            "QWQ_JAX_RESOURCE": request.metadata["qwq-jax-resource"],
            "QWQ_JAX_JOB": request.metadata["qwq-jax-job"],
        }
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in given.items())
        # One word: gcloud, ssh and two shells pass it on, and each of them splits and quotes in its own way.
        script = base64.b64encode((exports + request.metadata["startup-script"]).encode()).decode()
        self.gcloud.ssh(request.zone, self.vm, f"echo {script} | base64 -d | sudo bash")
        record = self.record()
        self.objects.put(record.places.vm_started(record.attempt), b"")

    def delete(self, zone: str, name: str) -> None:
        """Takes the attempt for gone; its agents see the record or the outcome, and stop."""
        record = self.record()
        self.objects.put(record.places.vm_left(record.attempt), b"")
