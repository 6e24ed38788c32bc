"""The start script for real: four workers install, train the embedded model together, are preempted, and finish."""

import json
import socket
import threading
import time
from pathlib import Path

import gcsfs
import pytest

from gcp import client, staging, submission
from gcp import record as records
from gcp.driver import Launcher
from gcp.job import JobSpec
from gcp.logs import LogReader
from gcp.objects import Bucket
from qwq_jax.config.load import load_toml
from tests.gcp.bucket import bucket_server, environment
from tests.gcp.fake_tpu import serve
from tests.gcp.vms import ROOT, Vms
from tests.gcp.world import World

STEPS = 30
SFT = """
model = "{model}"
train_files = ["conversations.jsonl"]
output_dir = "gs://bucket/runs/tiny"
sequence_length = 96
rows_per_step = 8
steps = {steps}
save_every = 5
keep = 2
compute_dtype = "float32"
final_dtype = "float32"

[mesh]
data = 4

[optimizer]
learning_rate = 1e-4
"""


def job_files(directory: Path) -> None:
    """The configuration and the data of the job."""
    lines = []
    for number in range(64):
        question = {"role": "user", "content": f"What is {number} + 1?"}
        answer = {"role": "assistant", "reasoning_content": f"{number} + 1 = {number + 1}.", "content": f"{number + 1}"}
        lines.append(json.dumps({"messages": [question, answer]}))
    (directory / "conversations.jsonl").write_text("\n".join(lines) + "\n")
    model = ROOT / "qwq_jax" / "embedded" / "tiny-reasoner"
    (directory / "sft.toml").write_text(SFT.format(model=model, steps=STEPS))


def free_ports() -> int:
    """Of a range that a coordinator can use, attempt by attempt."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return min(free.getsockname()[1], 65_000)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_four_workers_train_are_preempted_and_finish(tmp_path):
    job_files(tmp_path)
    job = load_toml(ROOT / "configs" / "gcp" / "tiny_cpu.toml", JobSpec, ['project="p"', 'bucket="gs://bucket"'])
    with bucket_server() as storage, serve(World(time.time, provision=0.2, deletion=0.2)) as fake:
        variables = environment(storage, tmp_path)
        filesystem = gcsfs.GCSFileSystem(token="anon", endpoint_url=storage, skip_instance_cache=True)
        bucket = Bucket("gs://bucket", filesystem)
        vms = Vms(fake, storage, tmp_path / "disks", 4, variables, port=free_ports())
        files = submission.check(job, tmp_path)
        empty_lock = b"# everything is there already\n"
        staged = staging.stage(bucket, files, wheel=staging.build_wheel(), lock=empty_lock)
        now = time.time()
        fresh = records.Record(job=job, uid="abc123", staged=staged, created=now, deadline=now + 600, owner="one")
        records.save(bucket, fresh, generation=0)

        def sleep(seconds: float) -> None:
            vms.reap()
            time.sleep(min(seconds, 0.5))

        boot = staging.BOOT.read_text()
        launcher = Launcher(bucket, client.connect("p", endpoint=fake.url), "one", boot, time.time, sleep, print)
        preempted: list[str] = []
        over = threading.Event()

        def preempt() -> None:
            """Takes the first VMs away when a checkpoint has been committed."""
            while not preempted and not over.is_set():
                steps = [name for name in bucket.list("runs/tiny/") if name.endswith("COMMITTED")]
                if steps:
                    (queued,) = fake.world.resources.values()
                    fake.world.preempt(queued, time.time())
                    vms.kill(queued.name)
                    preempted.append(queued.name)
                time.sleep(0.1)

        watcher = threading.Thread(target=preempt)
        watcher.start()
        try:
            record = launcher.drive("tiny")
        finally:
            over.set()
            watcher.join()
            for name in list(vms.running):
                vms.kill(name)
        lines = list(LogReader(bucket, record).new_lines())
        assert record.outcome.kind == "done", "\n".join(lines[-80:])
        assert preempted == ["tiny-abc123-1"] and vms.booted == ["tiny-abc123-1", "tiny-abc123-2"]
        assert record.preemptions == 1 and record.failures == 0
        results = bucket.list(f"runs/tiny/model-{STEPS:06d}/")
        assert any(name.endswith("COMMITTED") or "manifest" in name for name in results), list(results)
        assert not fake.world.resources
    told = "\n".join(lines)
    for worker in range(4):
        assert f"[1.{worker}]" in told and f"[2.{worker}]" in told, "logs of all, also of those that were killed"
    installs = [path for path in (tmp_path / "disks").glob("worker-*/venv-*/INSTALLED")]
    assert len(installs) == 4
