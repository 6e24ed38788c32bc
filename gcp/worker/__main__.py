"""Starts the agent. The only module here that reads the environment."""

import fcntl
import os
import re
import signal
import sys
import time
from pathlib import Path

from gcp.worker.agent import Agent, Pace, Place
from gcp.worker.assignment import Assignment
from gcp.worker.google import Endpoints, Google

_PORT = 8476


def main() -> int:
    """Runs the agent, unless one runs on this VM already."""
    home = Path(os.environ.get("QWQ_JAX_HOME", "/var/lib/qwq_jax"))
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("an agent runs on this VM already")
            return 0
        # What the job starts must not hold the lock after us.
        os.set_inheritable(lock.fileno(), False)
        google = _google()
        text = _patiently(lambda: google.attribute("qwq-jax-job"))
        if text is None:
            print("error: this VM has no attribute qwq-jax-job", file=sys.stderr)
            return 2
        assignment = Assignment.from_json(text)
        google.bucket = assignment.bucket
        agent = Agent(
            google,
            assignment,
            _place(google, assignment),
            home=home,
            pace=_pace(),
            inherited=dict(os.environ),
        )
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(agent.guard, "signalled", True))
        agent.run()
    return 0


def _google() -> Google:
    defaults = Endpoints()
    endpoints = Endpoints(
        metadata=os.environ.get("QWQ_JAX_METADATA", defaults.metadata),
        storage=os.environ.get("QWQ_JAX_STORAGE", defaults.storage),
        tpu=os.environ.get("QWQ_JAX_TPU", defaults.tpu),
    )
    job = os.environ.get("QWQ_JAX_JOB")
    return Google(endpoints, {"qwq-jax-job": job} if job else None)


def _pace() -> Pace:
    """All periods, shorter by a factor for tests."""
    factor = float(os.environ.get("QWQ_JAX_PACE", "1"))
    defaults = Pace()
    return Pace(**{name: value * factor for name, value in defaults.__dict__.items()})


def _place(google: Google, assignment: Assignment) -> Place:
    """Reads the worker's number from its metadata, as TPU VMs have it."""
    environment = _patiently(lambda: google.attribute("tpu-env")) or ""
    index = int(_patiently(lambda: google.attribute("agent-worker-number")) or _field(environment, "WORKER_ID") or 0)
    # One entry a worker, the address last: "unknown:unknown:10.0.0.2,..."
    endpoints = (_patiently(lambda: google.attribute("worker-network-endpoints")) or "").split(",")
    slice_index = int(_field(environment, "MEGASCALE_SLICE_ID") or 0)
    slices = int(_field(environment, "MEGASCALE_NUM_SLICES") or 1)
    coordinator = None
    if assignment.cpu:
        port = int(os.environ.get("QWQ_JAX_COORDINATOR_PORT", _PORT))
        coordinator = (endpoints[0].rpartition(":")[2] or "localhost", port + 16 * (assignment.attempt % 16))
    return Place(slice_index * len(endpoints) + index, len(endpoints) * slices, coordinator)


def _field(environment: str, name: str) -> "str | None":
    found = re.search(rf"^{name}: *'?([^'\n]*)'?$", environment, re.MULTILINE)
    return found.group(1) if found else None


def _patiently(read):
    """Reads from a metadata server that may not be up yet."""
    for _ in range(30):
        try:
            return read()
        except OSError:
            time.sleep(2.0)
    return read()


if __name__ == "__main__":
    sys.exit(main())
