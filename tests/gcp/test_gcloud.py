"""The launcher through the real gcloud, whose own parser checks our flags, against the same server."""

import base64
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gcp import driver
from gcp.cloud import Refusal, Refused, State
from gcp.driver import ExistingVm
from gcp.gcloud import GcloudCloud, create_words
from gcp.record import load
from tests.gcp.fake_tpu import serve
from tests.gcp.memory import a_job, a_record
from tests.gcp.test_driver import Stage
from tests.gcp.world import World

needs_gcloud = pytest.mark.skipif(shutil.which("gcloud") is None, reason="no gcloud here")


def environment(url: str, tmp_path: Path) -> dict[str, str]:
    """Without credentials, and with the server in the place of both services."""
    (tmp_path / "home").mkdir(exist_ok=True)
    stubs = tmp_path / "bin"
    return os.environ | {
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{url}/",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{url}/compute/v1/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CORE_PROJECT": "p",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CONFIG": str(tmp_path / "config"),
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
        "HOME": str(tmp_path / "home"),
        "PATH": f"{stubs}:{os.environ['PATH']}",
    }


def runner(url: str, tmp_path: Path) -> Any:
    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        variables = environment(url, tmp_path)
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)

    return run


@needs_gcloud
@pytest.mark.slow
def test_preempted_and_done(tmp_path):
    stage = Stage(job=a_job(zones=("us-central2-b",)))
    stage.workers.seconds = 1500.0
    stage.world.lifetimes = [300.0, None]
    with serve(stage.world) as fake:
        cloud = GcloudCloud("p", runner(fake.url, tmp_path))
        launcher = stage.launcher(cloud=cloud, sleep=lambda seconds: stage.clock.sleep(max(seconds, 700)))
        record = launcher.drive("job")
    assert record.outcome.kind == "done" and record.preemptions == 1
    stage.check(results=["complete"])
    created = [call for call in fake.calls if call.method == "POST"]
    assert [call.path for call in created] == ["/v2/projects/p/locations/us-central2-b/queuedResources"] * 2
    assert all("spot" in call.body for call in created)
    metadata = created[0].body["tpu"]["nodeSpec"][0]["node"]["metadata"]
    assert metadata["startup-script"] == "boot" and json.loads(metadata["qwq-jax-job"])["attempt"] == 1


@needs_gcloud
@pytest.mark.slow
def test_refusals_and_every_way_to_pay(tmp_path):
    stage = Stage(job=a_job(zones=("us-central2-b",)))
    with serve(stage.world) as fake:
        cloud = GcloudCloud("p", runner(fake.url, tmp_path))
        stage.world.over_quota = {"us-central2-b"}
        request = driver.request(a_record(a_job(zones=("us-central2-b",)), attempt=1), boot="a,b\n'c'", now=1000.0)
        with pytest.raises(Refused) as caught:
            cloud.create(request)
        assert caught.value.reason is Refusal.QUOTA
        stage.world.over_quota.clear()
        assert cloud.get("us-central2-b", "none") is None
        cloud.delete("us-central2-b", "none")
        for number, (provisioning, slices) in enumerate([("reserved", 1), ("on-demand", 2), ("flex-start", 1)], 2):
            job = a_job(zones=("us-central2-b",), provisioning=provisioning, slices=slices, network="n")
            cloud.create(driver.request(a_record(job, attempt=number), boot="a,b\n'c'", now=1000.0))
        with pytest.raises(Refused) as caught:
            cloud.create(driver.request(a_record(job, attempt=number), boot="", now=1000.0))
        assert caught.value.reason is Refusal.NAME_TAKEN
    reserved, several, flexible = [c for c in fake.calls if c.method == "POST" and c.path.endswith("Resources")][1:4]
    assert reserved.body["reservationName"].endswith("reservations/-")
    assert several.body["tpu"]["nodeSpec"][0]["multisliceParams"]["nodeCount"] == 2
    assert several.body["tpu"]["nodeSpec"][0]["node"]["metadata"]["startup-script"] == "a,b\n'c'"
    assert flexible.path.startswith("/v2alpha1/") and flexible.body["provisioningModel"] == "FLEX_START"


@needs_gcloud
@pytest.mark.slow
def test_a_vm_that_exists(tmp_path):
    """ssh is a stub that keeps what it was told; the VM stays, whatever becomes of the job."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name in ("ssh", "scp"):
        (stubs / name).write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word" >>{tmp_path}/{name}.log; done\n')
        (stubs / name).chmod(0o755)
    stage = Stage(job=a_job(vm="mine", zones=("us-central2-b",)))
    with serve(World(stage.clock)) as fake:
        fake.vms["us-central2-b", "mine"] = "READY"
        gcloud = GcloudCloud("p", runner(fake.url, tmp_path))
        cloud = ExistingVm("mine", gcloud, stage.objects, lambda: load(stage.objects, "job").record)
        record = a_record(stage.job, phase="asked", attempt=1)
        request = driver.request(record, boot="echo hello", now=1000.0)
        assert cloud.get("us-central2-b", "x") is None
        cloud.create(request)
        assert cloud.get("us-central2-b", "x").state is State.ACTIVE
        fake.vms["us-central2-b", "mine"] = "STOPPED"
        assert cloud.get("us-central2-b", "x").state is State.LOST
        cloud.delete("us-central2-b", "x")
        assert cloud.get("us-central2-b", "x") is None
    told = (tmp_path / "ssh.log").read_text().split()
    assert told[-6:] == ["|", "base64", "-d", "|", "sudo", "bash"]
    script = base64.b64decode(told[-7]).decode()
    assert (
        script.endswith("echo hello") and f"export QWQ_JAX_JOB={shlex.quote(request.metadata['qwq-jax-job'])}" in script
    )
    assert not any(call.method == "DELETE" for call in fake.calls)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ERROR: gcloud crashed (ConnectionError): ('Connection aborted.', RemoteDisconnected())", Refusal.TRANSIENT),
        ("ERROR: There was a problem refreshing your current auth tokens: no route to host", Refusal.TRANSIENT),
        ("ERROR: (gcloud.compute.tpus) PERMISSION_DENIED: Cloud TPU API has not been used", Refusal.BAD_REQUEST),
    ],
)
def test_a_network_that_fails_is_not_taken_for_a_refusal(said, reason):
    cloud = GcloudCloud("p", lambda command: subprocess.CompletedProcess(list(command), 1, "", said))
    with pytest.raises(Refused) as caught:
        cloud.get("a", "x")
    assert caught.value.reason is reason


def test_words():
    request = driver.request(a_record(a_job(slices=2), attempt=1), boot="", now=1000.0)
    words = create_words(request, Path("M"))
    assert "--node-count=2" in words and "--node-prefix=job-abc123-1" in words and "--spot" in words
    assert not any(word.startswith("--node-id") for word in words)
    with pytest.raises(ValueError, match="use --client rest"):
        create_words(
            driver.request(a_record(a_job(provisioning="reserved", reservation="r"), attempt=1), boot="", now=0.0),
            Path("M"),
        )
