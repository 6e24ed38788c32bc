"""The launcher through Google's own Python client, against a server that speaks its REST."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from google.auth.exceptions import RefreshError, TransportError

from gcp import client, driver
from gcp.cloud import Refusal, Refused, State
from gcp.record import Outcome, conclude, load
from tests.gcp.fake_tpu import Call, Server, serve
from tests.gcp.memory import a_job, a_record
from tests.gcp.test_driver import Killed, Stage
from tests.gcp.world import Refusing


@pytest.fixture
def stage() -> Iterator[tuple[Stage, Server, client.ClientCloud]]:
    stage = Stage()
    stage.workers.seconds = 600.0
    with serve(stage.world) as fake:
        yield stage, fake, client.connect("p", endpoint=fake.url)


def drive(stage: Stage, cloud: Any, owner: str = "one") -> Any:
    return stage.launcher(owner, cloud=cloud, sleep=lambda seconds: stage.clock.sleep(max(seconds, 60))).drive("job")


def test_preempted_and_done(stage):
    stage, fake, cloud = stage
    stage.world.lifetimes = [200.0, None]
    record = drive(stage, cloud)
    assert record.outcome.kind == "done" and record.preemptions == 1
    stage.check(results=["complete"])
    assert [call.query["queuedResourceId"] for call in fake.calls if call.method == "POST"] == [
        "job-abc123-1",
        "job-abc123-2",
    ]
    assert all(call.query["force"] == "true" for call in fake.calls if call.method == "DELETE")


def test_no_room_then_quota_then_done(stage):
    stage, _, cloud = stage
    stage.world.dry, stage.world.over_quota = {"a"}, {"b"}

    def sleep(seconds: float) -> None:
        stage.clock.sleep(max(seconds, 90))
        if stage.clock() > stage.begin + 1000:
            stage.world.over_quota.clear()

    record = stage.launcher(cloud=cloud, sleep=sleep).drive("job")
    assert record.outcome.kind == "done" and record.zone == "b" and record.failures == 0
    stage.check(results=["complete"])


def test_killed_after_asking(stage):
    """The answer is lost with the launcher; the resource is found, not asked for again."""
    stage, fake, cloud = stage
    fake.after = lambda call: _die(call)
    with pytest.raises(Killed):
        stage.launcher(cloud=_Dying(cloud)).drive("job")
    fake.after = lambda call: None
    assert drive(stage, cloud, "two").outcome.kind == "done"
    assert sum(call.method == "POST" for call in fake.calls) == 1
    stage.check(results=["complete"])


def _die(call: Call) -> None:
    """The server has done what it was asked."""


class _Dying:
    def __init__(self, cloud: client.ClientCloud) -> None:
        self._cloud = cloud
        self.get, self.list, self.delete = cloud.get, cloud.list, cloud.delete

    def create(self, request: Any) -> None:
        self._cloud.create(request)
        raise Killed


def test_cancelled(stage):
    stage, _, cloud = stage
    record = load(stage.objects, "job").record
    conclude(stage.objects, record, Outcome(kind="cancelled", detail="", at=0.0))
    assert drive(stage, cloud).outcome.kind == "cancelled"
    stage.check(results=[])


@pytest.mark.parametrize(
    ("status", "word", "message", "reason"),
    [
        (429, "RESOURCE_EXHAUSTED", "Quota limit exceeded", Refusal.QUOTA),
        (429, "RESOURCE_EXHAUSTED", "There is no more capacity", Refusal.STOCK_OUT),
        (400, "INVALID_ARGUMENT", "Accelerator type v9 is unknown", Refusal.BAD_REQUEST),
        (403, "PERMISSION_DENIED", "tpu.nodes.create is missing", Refusal.BAD_REQUEST),
        (404, "NOT_FOUND", "zone a does not exist", Refusal.BAD_REQUEST),
        (409, "ALREADY_EXISTS", "already exists", Refusal.NAME_TAKEN),
        (500, "INTERNAL", "oops", Refusal.TRANSIENT),
    ],
)
def test_each_refusal_by_its_name(stage, status, word, message, reason):
    _, fake, cloud = stage

    def refuse(call: Call) -> None:
        raise Refusing(status, word, message)

    fake.before = refuse
    with pytest.raises(Refused) as caught:
        cloud.create(driver.request(a_record(attempt=1), boot="boot", now=1000.0))
    assert caught.value.reason is reason


def test_no_server_is_no_answer():
    cloud = client.connect("p", endpoint="http://127.0.0.1:9")
    with pytest.raises(Refused) as caught:
        cloud.get("a", "x")
    assert caught.value.reason is Refusal.TRANSIENT


@pytest.mark.parametrize(
    "error", [TransportError("no route"), RefreshError("no route", retryable=True)], ids=["transport", "refresh"]
)
def test_a_token_that_cannot_be_fetched_now_is_no_answer(error):
    def call() -> None:
        raise error

    with pytest.raises(Refused) as caught:
        client._asked(call)
    assert caught.value.reason is Refusal.TRANSIENT
    with pytest.raises(RefreshError):
        client._asked(lambda: (_ for _ in ()).throw(RefreshError("log in again")))


def test_a_preempted_node_is_seen_before_its_resource_says_so(stage):
    stage, _, cloud = stage
    cloud.create(driver.request(a_record(attempt=1), boot="boot", now=1000.0))
    stage.workers.mute = True
    stage.clock.sleep(100)
    assert cloud.get("a", "job-abc123-1").state is State.ACTIVE
    stage.world.resources["a", "job-abc123-1"].node_states = {"job-abc123-1": "PREEMPTED"}
    assert cloud.get("a", "job-abc123-1").state is State.LOST


@pytest.mark.parametrize("provisioning", ["on-demand", "spot", "reserved"])
@pytest.mark.parametrize("slices", [1, 3])
def test_what_is_asked_for(stage, provisioning, slices):
    _, fake, cloud = stage
    job = a_job(
        provisioning=provisioning, slices=slices, topology="v5e:4x4", service_account="tpu@p", external_ips=False
    )
    record = a_record(job, attempt=1)
    cloud.create(driver.request(record, boot="#!/bin/bash", now=record.created))
    (call,) = [call for call in fake.calls if call.method == "POST"]
    assert call.path == "/v2/projects/p/locations/a/queuedResources"
    body = call.body
    (spec,) = body["tpu"]["nodeSpec"]
    assert spec["node"]["acceleratorType"] == "v5litepod-16"
    assert spec["node"]["runtimeVersion"] == "v2-alpha-tpuv5-lite"
    assert spec["node"]["serviceAccount"]["email"] == "tpu@p"
    assert not spec["node"]["networkConfig"].get("enableExternalIps")
    assert ("spot" in body) == (provisioning == "spot")
    assert ("guaranteed" in body) == (provisioning == "reserved")
    assert body.get("reservationName", "").endswith("reservations/-") == (provisioning == "reserved")
    if slices == 1:
        assert spec["nodeId"] == "job-abc123-1"
    else:
        assert spec["multisliceParams"] == {"nodeCount": 3, "nodeIdPrefix": "job-abc123-1"}
    assert body["queueingPolicy"]["validUntilDuration"] == "36000s"
    told = json.loads(spec["node"]["metadata"]["qwq-jax-job"])
    assert told["command"][-1] == "--distributed" and told["deadline"] == record.deadline


def test_flex_start_needs_gcloud(stage):
    _, _, cloud = stage
    with pytest.raises(ValueError, match="--client gcloud"):
        cloud.create(driver.request(a_record(a_job(provisioning="flex-start"), attempt=1), boot="", now=1000.0))
