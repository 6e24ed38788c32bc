"""What a dry run prints, beside what a launcher sends that nothing disturbs."""

import json
import shlex
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest

from gcp import rehearsal, staging, submission, tpu
from gcp.job import JobSpec
from gcp.objects import PlannedObjects
from qwq_jax.config.load import load_toml
from tests.gcp.fake_tpu import Call, serve
from tests.gcp.world import Queued, World

JOB = """
name = "job"
project = "p"
bucket = "gs://bucket"
verb = "convert"
arguments = ["gs://bucket/hf", "gs://bucket/ours"]
topology = "v5e:4x4"
zones = ["a", "b"]
provisioning = "spot"
deadline_hours = 10
"""
NOW = 1000.0


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A job, a clock that stands, and names that do not change."""
    (tmp_path / "job.toml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(staging, "build_wheel", lambda: ("w.whl", b"wheel"))
    monkeypatch.setattr(submission.secrets, "token_hex", lambda size: "0" * 2 * size)
    monkeypatch.setattr(tpu, "_now", lambda: NOW)
    return tmp_path


def requests(said: str) -> list[str]:
    """Lines, and bodies in a form of their own."""
    found: list[str] = []
    body: list[str] = []
    for line in said.splitlines():
        if line == "{" or body:
            body.append(line)
        else:
            found.append(line)
        if line == "}":
            found.append(json.dumps(json.loads("\n".join(body)), sort_keys=True))
            body = []
    return found


def heard(call: Call) -> list[str]:
    """A request that came, as a dry run prints it; how answers are encoded is no part of it."""
    query = {key: value.lower() for key, value in call.query.items() if key != "$alt"}
    address = f"{call.method} https://tpu.googleapis.com{call.path}" + (f"?{urlencode(query)}" if query else "")
    if not call.body:
        return [address]
    metadata = call.body["tpu"]["nodeSpec"][0]["node"]["metadata"]
    metadata["startup-script"] = rehearsal._short("startup-script", metadata["startup-script"])
    return [address, json.dumps(call.body, sort_keys=True)]


def sent(monkeypatch: Any, arguments: list[str], prepare: Callable[[PlannedObjects, World], None]) -> list[str]:
    """What the same command sends, with a bucket that keeps account and a server in the place of Google's."""
    lines: list[str] = []
    bucket = PlannedObjects(lambda line: lines.extend(requests(line)))
    world = World(lambda: NOW, provision=0.0, deletion=0.0)
    # Workers that are done at once, and slower than the launcher at deleting what they run on.
    world.vm = lambda queued, now: rehearsal.finish(bucket.others(), "job")
    with serve(world) as fake:
        prepare(bucket, world)
        fake.before = lambda call: lines.extend(heard(call))
        with monkeypatch.context() as patched:
            patched.setattr(tpu, "open_bucket", lambda address: bucket)
            patched.setattr(time, "sleep", lambda seconds: None)
            patched.setenv("QWQ_JAX_TPU_ENDPOINT", fake.url)
            assert tpu.main(arguments) == 0
    return lines


def submitted(bucket: PlannedObjects, world: World) -> None:
    """The first attempt of a job, as rehearsals of other verbs find it."""
    job = load_toml("job.toml", JobSpec)
    record = rehearsal.seed(bucket.others(), job, now=NOW)
    spec = {"parent": "projects/p/locations/a", "nodeId": record.resource, "node": {}}
    world.create("a", record.resource, {"tpu": {"nodeSpec": [spec]}})
    queued: Queued = world.resources["a", record.resource]
    queued.state, queued.active_from = "ACTIVE", NOW
    queued.node_states = dict.fromkeys(queued.nodes, "READY")


@pytest.mark.parametrize("slices", [1, 3])
def test_a_rehearsed_submit_prints_what_is_sent(place, capsys, monkeypatch, slices):
    arguments = ["submit", "job.toml", "--set", f"slices={slices}"]
    assert tpu.main([*arguments, "--dry-run"]) == 0
    printed = requests(capsys.readouterr().out)
    assert printed == sent(monkeypatch, arguments, lambda bucket, world: None)
    looks = [line for line in printed if line.startswith("GET https://") and "/nodes/job-000000-1" in line]
    assert len({*looks}) == slices, "every node is looked at"


@pytest.mark.parametrize("verb", ["watch", "cancel", "status"])
def test_other_rehearsed_verbs_print_what_is_sent(place, capsys, monkeypatch, verb):
    tpu.main([verb, "job.toml", "--dry-run"])
    printed = requests(capsys.readouterr().out)
    expected = sent(monkeypatch, [verb, "job.toml"], submitted)
    # What these verbs tell themselves is not compared.
    assert [line for line in printed if is_request(line)] == [line for line in expected if is_request(line)]
    assert any("/nodes/" in line for line in printed)


def is_request(line: str) -> bool:
    return line.startswith(("GET ", "PUT ", "LIST ", "POST ", "DELETE ", "{"))


@pytest.mark.parametrize("verb", ["logs -f", "watch", "cancel"])
def test_rehearsals_end_and_stay_in_their_first_attempt(place, capsys, verb):
    for changes in ([], ["--set", "vm=mine", "--set", 'zones=["a"]']):
        tpu.main([*shlex.split(verb)[:1], "job.toml", *shlex.split(verb)[1:], *changes, "--dry-run"])
        said = capsys.readouterr().out
        assert "record.json" in said and "0002" not in said and "job-000000-2" not in said
        concluded = any(line.startswith("PUT ") and "outcome.json" in line for line in said.splitlines())
        assert concluded == (verb == "cancel"), "elsewhere the workers write it"


def test_a_rehearsal_prints_no_secret(place, capsys):
    settings = ["--set", "environment.HF_TOKEN=hf_abc123", "--set", "environment.LEVEL=loud"]
    assert tpu.main(["submit", str(place / "job.toml"), "--dry-run", *settings]) == 0
    printed = capsys.readouterr().out
    assert "hf_abc123" not in printed and "***" in printed and "loud" in printed
