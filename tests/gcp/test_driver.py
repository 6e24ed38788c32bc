"""A launcher against a cloud that takes, refuses and forgets, and launchers that are killed anywhere."""

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from gcp import record as records
from gcp.cloud import Refusal, Refused
from gcp.driver import Launcher, TakenOver
from gcp.objects import Unavailable
from gcp.record import Outcome, Record
from tests.gcp.memory import Clock, MemoryObjects, Workers, a_job, submitted
from tests.gcp.world import World, WorldCloud


@dataclass
class Stage:
    """A world with one submitted job."""

    job: Any = field(default_factory=a_job)
    clock: Clock = field(default_factory=Clock)
    objects: MemoryObjects = field(default_factory=MemoryObjects)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world = World(self.clock)
        self.workers = Workers(self.objects, self.world)
        self.world.vm = self.workers
        self.begin = self.clock()
        submitted(self.objects, self.job, self.clock())

    def launcher(self, owner: str = "one", *, objects: Any = None, cloud: Any = None, sleep: Any = None) -> Launcher:
        return Launcher(
            objects or self.objects,
            cloud or WorldCloud(self.world),
            owner,
            "boot",
            self.clock,
            sleep or self.clock.sleep,
            self.said.append,
        )

    def run(self) -> Record:
        return self.launcher().drive("job")

    def settle(self, seconds: float) -> None:
        """Time without a launcher."""
        for _ in range(int(seconds // 30)):
            self.clock.sleep(30)
            self.world.advance()

    def check(self, *, results: list[str] | None = None) -> None:
        """What holds at the end of every story."""
        assert not self.world.resources, "a resource was left"
        assert len(set(self.workers.starts)) == len(self.workers.starts)
        held = sorted((begin, end) for _, begin, end in self.world.held())
        for (_, end), (begin, _) in itertools.pairwise(held):
            assert end is not None and begin >= end, "two resources at a time"
        deadline = self.begin + self.job.deadline_hours * 3600
        assert all(end is not None and end <= deadline + 60 for _, end in held)
        if results is not None:
            assert self.workers.results == results


def test_a_job_from_beginning_to_end():
    stage = Stage()
    record = stage.run()
    assert record.outcome.kind == "done" and record.attempt == 1
    stage.check(results=["complete"])
    (interval,) = record.intervals
    assert interval.end - interval.begin == pytest.approx(3000, abs=60)


def test_preempted_twice():
    stage = Stage()
    stage.world.lifetimes = [500.0, 700.0, None]
    record = stage.run()
    assert record.outcome.kind == "done" and record.preemptions == 2 and record.attempt == 3
    stage.check(results=["complete"])


def test_out_of_stock_in_one_zone():
    stage = Stage()
    stage.world.dry = {"a"}
    record = stage.run()
    assert record.outcome.kind == "done" and record.zone == "b" and record.failures == record.preemptions == 0
    stage.check(results=["complete"])


def test_quota_in_one_zone_and_a_queue_that_stands_in_another():
    stage = Stage(job=a_job(zones=("a", "b", "c")))
    stage.world.over_quota, stage.world.stuck = {"a"}, {"b"}
    record = stage.run()
    assert record.outcome.kind == "done" and record.zone == "c"
    stage.check(results=["complete"])


def test_no_room_anywhere_until_the_deadline():
    stage = Stage(job=a_job(deadline_hours=2.0))
    stage.world.dry = {"a", "b"}
    record = stage.run()
    assert record.outcome.kind == "deadline"
    assert record.attempt < 30, "the waits get longer"
    stage.check(results=[])


def test_a_job_that_takes_too_long():
    stage = Stage(job=a_job(deadline_hours=0.5))
    assert stage.run().outcome.kind == "deadline"
    stage.check(results=[])


def test_always_preempted():
    stage = Stage(job=a_job(preemptions=3))
    stage.world.lifetimes = [100.0] * 10
    record = stage.run()
    assert record.outcome.kind == "failed" and "preempted 4 times" in record.outcome.detail
    stage.check(results=[])


def test_vms_whose_agent_never_comes_up():
    stage = Stage(job=a_job(failures=1))
    stage.workers.mute = True
    record = stage.run()
    assert record.outcome.kind == "failed" and "no sign" in record.outcome.detail
    stage.check(results=[])


def test_the_laptop_is_lost_while_the_job_runs():
    """The workers finish, and delete what they run on."""
    stage = Stage()
    _lose(stage, after=200)
    stage.settle(5000)
    stage.check(results=["complete"])
    assert stage.launcher("two").drive("job").outcome.kind == "done"


def test_the_laptop_is_lost_and_the_job_never_ends():
    stage = Stage(job=a_job(deadline_hours=1.0))
    stage.workers.seconds = 1e9
    _lose(stage, after=200)
    stage.settle(3600)
    stage.check(results=[])


def test_the_laptop_is_lost_in_the_queue():
    """No VM is there to end it, and the cloud itself does when the wait has become useless."""
    stage = Stage(job=a_job(deadline_hours=1.0, zones=("a",)))
    stage.world.stuck = {"a"}
    _lose(stage, after=200)
    stage.settle(3700)
    assert {queued.state for queued in stage.world.resources.values()} == {"FAILED"}
    assert not stage.world.held()


@pytest.mark.parametrize("after", [0, 15, 30, 60, 90, 500, 2990, 3060, 3075])
def test_cancelled_at_every_state(after):
    stage = Stage()
    _lose(stage, after=after)
    record = records.load(stage.objects, "job").record
    records.conclude(stage.objects, record, Outcome(kind="cancelled", detail="", at=stage.clock()))
    ended = stage.launcher("canceller").drive("job")
    assert ended.outcome.kind in ("cancelled", "done")
    stage.check()
    assert stage.launcher("late").drive("job").outcome == ended.outcome


@pytest.mark.parametrize("saving", [60.0, 1e9], ids=["saves", "never ends"])
def test_a_cancelled_job_has_two_minutes_to_save(saving):
    stage = Stage()
    stage.workers.saving = saving
    _lose(stage, after=500)
    record = records.load(stage.objects, "job").record
    begin = stage.clock()
    records.conclude(stage.objects, record, Outcome(kind="cancelled", detail="", at=begin))
    assert stage.launcher("canceller").drive("job").outcome.kind == "cancelled"
    assert stage.workers.saved == (["job-abc123-1"] if saving == 60.0 else [])
    ((_, _, end),) = stage.world.held()
    assert begin + min(saving, 120) <= end <= begin + min(saving, 120) + 30
    stage.check(results=[])


def test_at_the_deadline_a_job_has_two_minutes_to_save():
    stage = Stage(job=a_job(deadline_hours=0.5))
    stage.workers.saving = 45.0
    assert stage.run().outcome.kind == "deadline"
    assert stage.workers.saved == ["job-abc123-1"]
    stage.check(results=[])


class Killed(BaseException):
    """As by SIGKILL: nothing is cleaned up."""


class Mortal:
    """Passes calls on, and dies at one of them, before or after it took effect."""

    def __init__(self, inner: Any, budget: list[int], *, after: bool) -> None:
        self._inner, self._budget, self._after = inner, budget, after

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self._budget[0] -= 1
            if self._budget[0] == 0 and not self._after:
                raise Killed
            found = getattr(self._inner, name)(*arguments, **options)
            if self._budget[0] == 0:
                raise Killed
            return found

        return call


def _lose(stage: Stage, *, after: float) -> None:
    """Runs a launcher for so many seconds."""
    until = stage.clock() + after

    def sleep(seconds: float) -> None:
        if stage.clock() >= until:
            raise Killed
        stage.clock.sleep(seconds)

    with pytest.raises(Killed):
        stage.launcher("lost", sleep=sleep).drive("job")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_launchers_killed_at_any_call(after):
    """The first 60 calls one by one and 20 later ones by chance, with a preemption and an empty zone on the way."""
    later = random.Random(0).sample(range(60, 400), 20)
    for kill in [*range(1, 60), *later]:
        stage = Stage()
        stage.world.dry, stage.world.lifetimes = {"a"}, [400.0, None]
        budget = [kill]
        mortal = stage.launcher(
            "one",
            objects=Mortal(stage.objects, budget, after=after),
            cloud=Mortal(WorldCloud(stage.world), budget, after=after),
        )
        try:
            mortal.drive("job")
        except Killed:
            stage.settle(random.Random(kill).choice([0, 60, 3000]))
            record = stage.launcher("two").drive("job")
            assert record.outcome.kind == "done", kill
        stage.check(results=["complete"])


def test_of_two_launchers_the_newer_one_drives():
    stage = Stage()
    made = []

    def sleep(seconds: float) -> None:
        stage.clock.sleep(seconds)
        if not made and stage.clock() > stage.begin + 300:
            made.append(stage.launcher("two").drive("job"))

    with pytest.raises(TakenOver):
        stage.launcher("one", sleep=sleep).drive("job")
    assert made[0].outcome.kind == "done" and made[0].attempt == 1
    stage.check(results=["complete"])


def test_a_launcher_that_slept_between_writing_and_asking_leaves_no_second_job():
    """It wakes after another one went on, and asks for the resource of an attempt that is past."""
    stage = Stage()
    stage.workers.seconds = 6000.0
    slept: list[Any] = []

    class Sleeper(WorldCloud):
        def create(self, request: Any) -> None:
            slept.append(request)
            raise Killed

    with pytest.raises(Killed):
        stage.launcher("one", cloud=Sleeper(stage.world)).drive("job")
    stage.world.lifetimes = [300.0, None]

    def sleep(seconds: float) -> None:
        stage.clock.sleep(seconds)
        if slept and len([q for q in stage.world.history if q.active_from]) == 2:
            WorldCloud(stage.world).create(slept.pop())

    record = stage.launcher("two", sleep=sleep).drive("job")
    assert record.outcome.kind == "done" and not slept
    assert not stage.world.resources
    assert stage.workers.starts == ["job-abc123-1", "job-abc123-2"], "the late one found its attempt past"


def test_what_an_earlier_attempt_left_is_deleted_and_a_later_one_is_not_touched():
    """A resource that waits has no VM that could see that it is not wanted."""
    stage = Stage()
    stage.world.stuck = {"b"}
    body = {"tpu": {"nodeSpec": [{"nodeId": "x", "node": {}}]}}
    for number in (1, 2, 3):
        stage.world.create("b", f"job-abc123-{number}", body)
    stage.world.create("b", "job-other-1", body)
    past = records.load(stage.objects, "job").record.changed(phase="asked", attempt=2)
    assert not stage.launcher()._sweep(past)
    stage.clock.sleep(60)
    stage.world.advance()
    assert sorted(name for _, name in stage.world.resources) == ["job-abc123-2", "job-abc123-3", "job-other-1"]
    stage.world.drop("b", "job-abc123-2")
    assert not stage.launcher()._sweep(past.changed(phase="over", attempt=3))
    stage.clock.sleep(60)
    stage.world.advance()
    assert [name for _, name in stage.world.resources] == ["job-other-1"]


def test_a_name_that_is_taken_is_not_asked_for_again():
    stage = Stage()
    asked: list[str] = []

    class Blocked(WorldCloud):
        def create(self, request: Any) -> None:
            asked.append(request.name)
            if len(asked) == 1:
                raise Refused(Refusal.NAME_TAKEN, "already exists")
            super().create(request)

    record = stage.launcher(cloud=Blocked(stage.world)).drive("job")
    assert record.outcome.kind == "done" and record.failures == 1
    assert asked == ["job-abc123-1", "job-abc123-2"]


class Refusing(WorldCloud):
    """Refuses looks, at one and at all."""

    refused: Refused

    def get(self, zone: str, name: str) -> Any:
        raise self.refused

    def list(self, zone: str) -> Any:
        raise self.refused


@dataclass
class Flaky:
    """The launcher's way to a bucket, closed from one time to another."""

    inner: MemoryObjects
    clock: Clock
    closed: tuple[float, float]

    def __getattr__(self, name: str) -> Any:
        if self.closed[0] <= self.clock() < self.closed[1]:
            raise Unavailable("gs://bucket does not answer")
        return getattr(self.inner, name)


@pytest.mark.parametrize("begin", range(15, 315, 15))
def test_a_bucket_that_is_away_for_a_while(begin):
    stage = Stage()
    stage.workers.seconds = 9000.0
    away = Flaky(stage.objects, stage.clock, (stage.begin + begin, stage.begin + begin + 7000))
    record = stage.launcher(objects=away).drive("job")
    assert record.outcome.kind == "done" and record.attempt == 1 and record.failures == 0
    stage.check(results=["complete"])


def test_the_deadline_holds_without_a_bucket():
    stage = Stage(job=a_job(deadline_hours=1.0))
    stage.workers.mute = True
    away = Flaky(stage.objects, stage.clock, (stage.begin + 300, float("inf")))
    with pytest.raises(Unavailable):
        stage.launcher(objects=away).drive("job")
    assert not stage.world.resources and stage.clock() < stage.begin + 3600 + 300


def test_what_the_cloud_refuses_for_good_is_not_waited_for():
    """A zone with a typing error, an API that is not enabled, a permission that is missing."""
    stage, cloud = Stage(), Refusing(Stage().world)
    cloud.refused = Refused(Refusal.BAD_REQUEST, "Location a is not found")
    outcome = stage.launcher(cloud=cloud).drive("job").outcome
    assert (outcome.kind, outcome.detail) == ("bad-input", "Location a is not found")
    assert stage.clock() < stage.begin + 300 and not stage.world.history


def test_the_deadline_holds_while_the_cloud_does_not_answer():
    stage, cloud = Stage(job=a_job(deadline_hours=1.0)), Refusing(Stage().world)
    cloud.refused = Refused(Refusal.TRANSIENT, "connection refused")

    def sleep(seconds: float) -> None:
        stage.clock.sleep(seconds)
        if stage.clock() > stage.begin + 3700:
            raise Killed

    with pytest.raises(Killed):
        stage.launcher(cloud=cloud, sleep=sleep).drive("job")
    record = records.load(stage.objects, "job").record
    assert records.outcome(stage.objects, record).kind == "deadline"
    assert stage.launcher("two").drive("job").outcome.kind == "deadline"
    assert not stage.world.history


def test_a_cloud_that_does_not_answer_for_a_while():
    stage = Stage()
    trouble = iter([True] * 10 + [False] * 10_000)

    class Absent(WorldCloud):
        def get(self, zone: str, name: str) -> Any:
            if next(trouble):
                raise Refused(Refusal.TRANSIENT, "connection refused")
            return super().get(zone, name)

    assert stage.launcher(cloud=Absent(stage.world)).drive("job").outcome.kind == "done"
    stage.check(results=["complete"])
