"""A launcher that may not look any more, or has no bucket from the start: how long it waits, and what it says then."""

import shlex
from dataclasses import dataclass
from typing import Any

import pytest
from google.auth.exceptions import RefreshError

from gcp import record as records
from gcp import tpu
from gcp.cloud import Refusal, Refused, Resource, State
from gcp.driver import PATIENCE, Launcher, OutOfSight
from gcp.gcloud import GcloudCloud
from gcp.objects import Unavailable
from gcp.record import Outcome
from tests.gcp.memory import a_job, a_record
from tests.gcp.test_driver import Flaky, Stage
from tests.gcp.world import WorldCloud

DENIED = Refused(Refusal.BAD_REQUEST, "tpu.queuedResources.get denied")
CALLS: dict[str, tuple[str, str, Exception]] = {
    "look": ("cloud", "get", DENIED),
    "deletion": ("cloud", "delete", DENIED),
    "bucket": ("objects", "get", OSError("Forbidden: gs://bucket")),
    "login": ("cloud", "get", RefreshError("log in again")),
}


@dataclass
class Forbidding:
    """Passes calls on, but for one that is forbidden from one time to another."""

    inner: Any
    stage: Stage
    call: str
    error: Exception
    closed: tuple[float, float]

    def __getattr__(self, name: str) -> Any:
        if name == self.call and self.closed[0] <= self.stage.clock() - self.stage.begin < self.closed[1]:
            raise self.error
        return getattr(self.inner, name)


def forbidden(stage: Stage, case: str, begin: float, end: float = float("inf")) -> Launcher:
    what, call, error = CALLS[case]
    inner = {"cloud": WorldCloud(stage.world), "objects": stage.objects}[what]
    return stage.launcher(**{what: Forbidding(inner, stage, call, error, (begin, end))})


@pytest.mark.parametrize("case", CALLS)
def test_a_permission_that_is_lost_for_good(case):
    """The launcher goes, and the job does not: its VMs see to it, and another launcher takes it up."""
    stage = Stage()
    if case == "deletion":
        stage.world.vm = Quiet(stage)
    with pytest.raises(OutOfSight) as caught:
        forbidden(stage, case, 500).drive("job")
    begin = 500 if case != "deletion" else stage.workers.seconds
    assert begin + PATIENCE <= stage.clock() - stage.begin <= begin + PATIENCE + 200
    told = str(caught.value)
    assert told.startswith("job job cannot be looked after, for 30 minutes now: ") and str(CALLS[case][2])[-10:] in told
    assert "job-abc123-1 in a may still run, and its VMs delete it at " in told
    command = shlex.split(told.partition("this deletes it: ")[2])
    assert command == GcloudCloud("p").delete_command("a", "job-abc123-1") and "--force" in command
    assert [*stage.world.resources] == [("a", "job-abc123-1")], "nothing is deleted unseen"
    assert records.load(stage.objects, "job").record.outcome is None
    assert stage.launcher("two").drive("job").outcome.kind == "done"
    stage.check(results=["complete"])


class Quiet:
    """Workers that leave the deletion to the launcher."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __call__(self, queued: Any, now: float) -> None:
        if not self.stage.workers.results:
            self.stage.workers(queued, now)


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("begin", [40, 500])
def test_a_permission_that_comes_back(case, begin):
    stage = Stage()
    record = forbidden(stage, case, begin, begin + PATIENCE - 100).drive("job")
    assert record.outcome.kind == "done" and record.attempt == 1
    stage.check(results=["complete"])


def test_patience_begins_anew_when_a_call_succeeds():
    stage = Stage()
    stage.workers.seconds = 6000.0
    cloud = Forbidding(WorldCloud(stage.world), stage, "get", DENIED, (500, 500 + PATIENCE - 100))
    again = Forbidding(cloud, stage, "get", DENIED, (3000, 3000 + PATIENCE - 100))
    assert stage.launcher(cloud=again).drive("job").outcome.kind == "done"


def test_a_permission_that_is_lost_between_asking_and_looking():
    """Nobody has seen the resource, and the cloud took the request for it."""
    stage = Stage()

    class Blind(WorldCloud):
        def get(self, zone: str, name: str) -> Any:
            if self.world.history:
                raise DENIED
            return super().get(zone, name)

    with pytest.raises(OutOfSight, match="job-abc123-1 in a may still run"):
        stage.launcher(cloud=Blind(stage.world)).drive("job")
    assert records.outcome(stage.objects, records.load(stage.objects, "job").record) is None


def test_a_login_that_never_worked_is_not_waited_for():
    stage = Stage()
    with pytest.raises(RefreshError):
        forbidden(stage, "login", 0).drive("job")
    assert stage.clock() == stage.begin


def test_what_may_not_be_swept_is_named():
    stage = Stage()
    stage.world.stuck = {"b"}
    stage.world.create("b", "job-abc123-1", {"tpu": {"nodeSpec": [{"nodeId": "x", "node": {}}]}})
    ended = Outcome(kind="done", detail="", at=0.0)
    past = records.load(stage.objects, "job").record.changed(phase="over", attempt=1, outcome=ended)
    stage.objects.put("qwq_jax/jobs/job/record.json", past.model_dump_json().encode())
    with pytest.raises(OutOfSight, match="job-abc123-1 in b may still run"):
        forbidden(stage, "deletion", 0).drive("job")


def test_a_vm_that_is_its_owners_is_named_and_no_command_deletes_it():
    stage = Stage()
    launcher = stage.launcher()
    record = a_record(a_job(vm="mine", zones=("a",)), phase="asked", attempt=1)
    launcher._forbid("look", record, "denied")
    stage.clock.sleep(PATIENCE)
    with pytest.raises(OutOfSight, match="VM mine may still run it") as caught:
        launcher._forbid("look", record, "denied")
    assert "delete" not in str(caught.value)


def test_what_was_refused_of_one_resource_is_not_held_against_another():
    stage = Stage()
    launcher, record = stage.launcher(), a_record(a_job(zones=("a",)), phase="asked", attempt=3)
    first, second = (Resource(name=f"job-abc123-{n}", zone="a", state=State.ACTIVE) for n in (1, 2))
    launcher._forbid("sweep", record, "denied", first)
    stage.clock.sleep(2 * PATIENCE)
    launcher._forbid("sweep", record, "denied", second)
    launcher._forbid("delete", record.changed(attempt=4), "denied")
    with pytest.raises(OutOfSight, match="job-abc123-1 in a may still run"):
        launcher._forbid("sweep", record, "denied", first)


def test_the_exit_code_of_a_job_that_is_out_of_sight(tmp_path, monkeypatch, capsys):
    def lost(self: Launcher, job: str) -> None:
        raise OutOfSight("job job cannot be looked after")

    monkeypatch.setattr(Launcher, "drive", lost)
    lines = a_job(zones=("a",)).model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    text = "\n".join(f"{key} = {value!r}" for key, value in lines.items())
    (tmp_path / "job.toml").write_text(text)
    assert tpu.main(["watch", str(tmp_path / "job.toml"), "--dry-run"]) == 1
    assert "error: job job cannot be looked after" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [1, 100, PATIENCE - 1])
def test_a_bucket_that_is_away_at_the_first_look(seconds):
    stage = Stage()
    away = Flaky(stage.objects, stage.clock, (stage.begin, stage.begin + seconds))
    assert stage.launcher(objects=away).drive("job").outcome.kind == "done"
    assert stage.said[0] == "waiting: gs://bucket does not answer"
    stage.check(results=["complete"])


def test_a_bucket_that_never_answers():
    stage = Stage()
    before = dict(stage.objects.found)
    away = Flaky(stage.objects, stage.clock, (stage.begin, float("inf")))
    with pytest.raises(Unavailable, match="nor did it for 30 minutes: whether job job runs is not known, .* `watch`"):
        stage.launcher(objects=away).drive("job")
    assert stage.clock() == stage.begin + PATIENCE and len(stage.said) < 20, "the waits get longer"
    assert stage.objects.found == before and not stage.world.history
