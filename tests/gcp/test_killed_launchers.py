"""``python gcp/tpu.py submit`` as a process, killed by SIGKILL at seeded requests, and submitted again."""

import itertools
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
from tests.gcp.fake_tpu import Call, serve
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
deadline_hours = 100
"""

# Of the launcher's seconds.
PACE = 0.002


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


class Launchers:
    """Starts launchers one after another."""

    def __init__(self, storage: str, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gcp.launchers"],
            cwd=ROOT,
            env=environment(storage, directory),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, directory: Path, url: str) -> int:
        """Returns its process id."""
        variables = {"QWQ_JAX_TPU_ENDPOINT": url, "QWQ_JAX_PACE": str(PACE)}
        order = {"directory": str(directory), "environment": variables, "arguments": ["submit", "job.toml"]}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """Returns its exit code."""
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


def story(launchers: Launchers, bucket: Bucket, directory: Path, kill: int, *, before: bool) -> int:
    """One job whose first launcher dies at request `kill` to Cloud TPU; returns how many requests there were."""
    directory.mkdir()
    (directory / "job.toml").write_text(JOB.format(name=directory.name))
    looks = itertools.count()
    world = World(lambda: float(next(looks)), provision=10.0, deletion=3.0, lifetimes=[12.0, None], dry={"dry"})
    world.vm = vms = ScriptedVms(bucket, world)
    # The record is there, so that no launcher spends its time on building a wheel that nobody installs.
    spec = load_toml(directory / "job.toml", JobSpec)
    submission.submit(bucket, spec, {}, build=lambda: ("w.whl", b""), owner="nobody", now=time.time() / PACE)
    struck: list[int] = []
    count = itertools.count(1)

    def strike(call: Call) -> None:
        if next(count) == kill:
            struck.append(launcher)
            os.kill(launcher, signal.SIGKILL)

    with serve(world) as fake:
        launcher = launchers.start(directory, fake.url)
        if before:
            fake.before = strike
        else:
            fake.after = strike
        code = launchers.wait()
        assert (code == -signal.SIGKILL) == bool(struck)
        if struck:
            fake.before = fake.after = lambda call: None
            launchers.start(directory, fake.url)
            code = launchers.wait()
        assert code == 0, (directory / "log").read_text()
    assert not world.resources, "a resource was left"
    assert len(vms.ended) == 1, "the job was done once"
    held = [(begin, end) for _, begin, end in world.held()]
    assert all(end is not None for _, end in held)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(held)), "two at a time"
    names = [queued.name for queued in world.history]
    assert len(set(names)) == len(names)
    assert len({name.rpartition("-")[0] for name in names}) == 1, "one run"
    return len(fake.calls)


@pytest.mark.slow
@pytest.mark.parametrize("points", [6, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_killed_at_seeded_points(tmp_path, monkeypatch, points):
    """The launcher's own code is not touched: the server kills it at the request, before or after it takes effect."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    chance = random.Random(0)
    with bucket_server() as storage:
        filesystem = gcsfs.GCSFileSystem(token="anon", endpoint_url=storage, skip_instance_cache=True)
        bucket = Bucket("gs://bucket", filesystem)
        launchers = Launchers(storage, tmp_path)
        try:
            whole = story(launchers, bucket, tmp_path / "whole", 100_000, before=True)
            assert whole >= 20
            for number in range(points):
                kill, before = chance.randrange(1, whole), chance.random() < 0.5
                story(launchers, bucket, tmp_path / f"job{number}", kill, before=before)
        finally:
            launchers.close()
