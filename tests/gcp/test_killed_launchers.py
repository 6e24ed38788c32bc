"""``python gcp/tpu.py submit`` as a process, killed by SIGKILL at seeded requests, and submitted again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import gcsfs
import pytest

from gcp import submission
from gcp.job import JobSpec
from gcp.objects import Bucket
from qwq_jax.config.load import load_toml
from tests.gcp.bucket import bucket_server, environment
from tests.gcp.fake_tpu import Call, Server, serve
from tests.gcp.vms import ROOT
from tests.gcp.world import Queued, World

JOB = """
name = "{name}"
project = "p"
bucket = "gs://bucket"
verb = "convert"
arguments = ["gs://bucket/hf", "gs://bucket/ours"]
topology = "v5e:2x2"
zones = ["dry", "wet"]
provisioning = "spot"
deadline_hours = 1
"""


class ScriptedVms:
    """Workers that need some looks at them to finish; the world's clock is the looks at it."""

    def __init__(self, bucket: Bucket, world: World) -> None:
        self.bucket, self.world = bucket, world
        self.looks: dict[str, int] = {}
        self.ended: list[str] = []

    def __call__(self, queued: Queued, now: float) -> None:
        told = json.loads(queued.node["metadata"]["qwq-jax-job"])
        record = json.loads(self.bucket.get(told["record"]).data)
        outcome = self.bucket.get(f"{told['run']}/outcome.json")
        if outcome or (record["uid"], record["attempt"]) != (told["uid"], told["attempt"]):
            self.world.drop(queued.zone, queued.name)
            return
        self.looks[queued.name] = self.looks.get(queued.name, 0) + 1
        if self.looks[queued.name] == 3 and len(self.looks) >= 2:
            ended = {"kind": "done", "detail": "all workers are done", "at": now}
            self.bucket.put(f"{told['run']}/outcome.json", json.dumps(ended).encode(), generation=0)
            self.ended.append(queued.name)


def submit(directory: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "gcp" / "tpu.py"), "submit", "job.toml"]
    return subprocess.Popen(
        command, cwd=directory, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def story(directory: Path, storage: str, kill: int, *, before: bool) -> int:
    """One job whose first launcher dies at request `kill` to Cloud TPU; returns how many requests there were."""
    directory.mkdir()
    (directory / "job.toml").write_text(JOB.format(name=directory.name))
    requests = iter(range(1, 10_000))
    looks = iter(range(10_000_000))
    world = World(lambda: float(next(looks)), provision=10.0, deletion=3.0, lifetimes=[12.0, None], dry={"dry"})
    filesystem = gcsfs.GCSFileSystem(token="anon", endpoint_url=storage, skip_instance_cache=True)
    bucket = Bucket("gs://bucket", filesystem)
    world.vm = vms = ScriptedVms(bucket, world)
    # The record is there, so that no launcher spends its time on building a wheel that nobody installs.
    spec = load_toml(directory / "job.toml", JobSpec)
    submission.submit(bucket, spec, {}, build=lambda: ("w.whl", b""), owner="nobody", now=time.time())
    with serve(world) as fake:
        variables = environment(storage, directory) | {"QWQ_JAX_TPU_ENDPOINT": fake.url, "QWQ_JAX_PACE": "0.002"}
        process = submit(directory, variables)
        _kill_at(fake, process, kill, before=before, requests=requests)
        process.communicate(timeout=60)
        killed = process.returncode == -signal.SIGKILL
        fake.before = fake.after = lambda call: None
        if killed:
            process = submit(directory, variables)
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0, said
        assert not world.resources, "a resource was left"
        assert len(vms.ended) == 1, "the job was done once"
        held = [(begin, end) for _, begin, end in world.held()]
        assert all(end is not None for _, end in held)
        assert all(first[1] <= second[0] for first, second in zip(held, held[1:], strict=False)), "two at a time"
        names = [queued.name for queued in world.history]
        assert len(set(names)) == len(names)
        assert len({name.rpartition("-")[0] for name in names}) == 1, "one run"
    return next(requests) - 1


def _kill_at(fake: Server, process: subprocess.Popen[str], kill: int, *, before: bool, requests) -> None:
    def strike(call: Call) -> None:
        if next(requests) == kill:
            os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.05)

    if before:
        fake.before = strike
    else:
        fake.after = strike


@pytest.mark.slow
def test_killed_at_twenty_seeded_points(tmp_path, monkeypatch):
    """The launcher's own code is not touched: the server kills it at the request, before or after it takes effect."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    chance = random.Random(0)
    # A run without a kill makes about this many requests: see the last story.
    points = [(chance.randrange(1, 30), chance.random() < 0.5) for _ in range(20)]
    with bucket_server() as storage:
        for number, (kill, before) in enumerate(points):
            story(tmp_path / f"job{number}", storage, kill, before=before)
        assert story(tmp_path / "whole", storage, 100_000, before=True) >= 30
