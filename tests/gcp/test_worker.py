"""The agent's parts, with a Google of files."""

import hashlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gcp.worker import install, rounds
from gcp.worker.__main__ import _place
from gcp.worker.agent import Agent, Pace, Place, Stopped
from gcp.worker.assignment import Assignment
from gcp.worker.google import Conflict, Endpoints, Google
from gcp.worker.guard import Guard, Reason
from gcp.worker.mirror import SEGMENT, LogMirror, ResultMirror


class MemoryGoogle:
    """One bucket, a metadata server and a TPU API that note what they are told."""

    def __init__(self) -> None:
        self.found: dict[str, bytes] = {}
        self.attributes: dict[str, str] = {}
        self.preempted = "FALSE"
        self.deleted: list[tuple[str, str, str]] = []
        self.absent = False
        self.puts: list[str] = []
        self.bucket = "bucket"

    def _there(self) -> None:
        if self.absent:
            raise OSError("no route to host")

    def metadata(self, path: str) -> str | None:
        return self.preempted if path == "instance/preempted" else None

    def attribute(self, key: str) -> str | None:
        return self.attributes.get(key)

    def get(self, name: str) -> bytes | None:
        self._there()
        return self.found.get(name)

    def put(self, name: str, data: bytes, *, only_new: bool = False) -> None:
        self._there()
        if only_new and name in self.found:
            raise Conflict(name)
        self.puts.append(name)
        self.found[name] = data

    def list(self, prefix: str) -> Any:
        self._there()
        return sorted(name for name in self.found if name.startswith(prefix))

    def delete_queued_resource(self, project: str, zone: str, name: str) -> None:
        self.deleted.append((project, zone, name))


def an_assignment(**changes: Any) -> Assignment:
    values = {
        "project": "p",
        "zone": "z",
        "resource": "job-abc123-1",
        "bucket": "bucket",
        "record": "record.json",
        "run": "run",
        "uid": "abc123",
        "attempt": 1,
        "deadline": time.time() + 600,
        "idle_seconds": 300.0,
        "failures": 1,
        "preemptions": 5,
        "command": ["sft", "x.toml"],
        "distributed": False,
        "agent": "agent",
        "wheel": "w",
        "lock": "l",
        "files": {},
        "results": [],
        "environment": {"GIVEN": "1"},
        "apt_packages": [],
        "compile_cache": "gs://bucket/cache",
        "cpu": True,
    }
    return Assignment(**(values | changes))


def tell(google: MemoryGoogle, *, attempt: int = 1) -> None:
    google.found["record.json"] = json.dumps({"uid": "abc123", "attempt": attempt, "failures": 0}).encode()


@pytest.fixture
def google() -> MemoryGoogle:
    google = MemoryGoogle()
    tell(google)
    return google


class TestGuard:
    def guard(self, google: MemoryGoogle, clock: list[float], **changes: Any) -> Guard:
        assignment = an_assignment(deadline=1000.0, idle_seconds=60.0, **changes)
        return Guard(google, assignment, clock=lambda: clock[0], period=10.0)

    def test_nothing_to_stop_for(self, google):
        guard, clock = self.guard(google, clock := [0.0]), clock
        for step in range(90):
            clock[0] = step * 10.0
            assert guard.look(step) is None

    def test_the_deadline_needs_no_bucket(self, google):
        guard = self.guard(google, clock := [0.0])
        google.absent = True
        clock[0] = 1000.0
        assert guard.look(1).reason is Reason.OVER

    def test_a_bucket_that_does_not_answer_is_no_reason(self, google):
        google.absent = True
        assert self.guard(google, [0.0]).look(1) is None

    def test_a_silent_log_is_idle_and_an_installation_is_not(self, google):
        guard = self.guard(google, clock := [0.0])
        assert guard.look(7) is None
        clock[0] = 59.0
        assert guard.look(7) is None
        clock[0] = 61.0
        assert guard.look(7).reason is Reason.OVER
        assert json.loads(google.found["run/outcome.json"])["kind"] == "idle"
        other = self.guard(google := MemoryGoogle(), clock := [0.0])
        for now in (0.0, 70.0, 140.0):
            clock[0] = now
            assert other.look(None) is None

    def test_another_attempt_is_wanted(self, google):
        tell(google, attempt=2)
        stop = self.guard(google, [0.0]).look(1)
        assert stop.reason is Reason.SUPERSEDED and stop.delete

    def test_an_outcome_and_a_preemption_and_a_shutdown(self, google):
        google.preempted = "TRUE"
        assert self.guard(google, [0.0]).look(1).reason is Reason.PREEMPTED
        google.preempted = "FALSE"
        google.found["run/outcome.json"] = b"{}"
        assert self.guard(google, [0.0]).look(1).reason is Reason.OVER
        guard = self.guard(google, [0.0])
        guard.signalled = True
        stop = guard.look(1)
        assert stop.reason is Reason.SIGNALLED and not stop.delete, "a boot may follow"


def test_logs_go_in_segments_of_which_only_the_last_is_sent_again(tmp_path, google):
    log = tmp_path / "log"
    mirror = LogMirror(google, log, "logs/0001-0000")
    mirror.copy()
    assert google.puts == []
    log.write_bytes(b"a" * (SEGMENT + 10))
    mirror.copy()
    log.write_bytes(log.read_bytes() + b"b")
    mirror.copy()
    mirror.copy()
    assert google.puts == ["logs/0001-0000-000000.log", *["logs/0001-0000-000001.log"] * 2]
    assert b"".join(google.found[name] for name in sorted(set(google.puts))) == log.read_bytes()


def test_results_go_when_they_change_and_come_back_whole(tmp_path, google):
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "out").mkdir(parents=True)
    (here / "out" / "answers.jsonl").write_text("1\n")
    mirror = ResultMirror(google, here, ["out/*.jsonl"], "run/results")
    mirror.copy()
    mirror.copy()
    (here / "out" / "answers.jsonl").write_text("1\n2\n")
    mirror.copy()
    assert google.puts == ["run/results/out/answers.jsonl"] * 2
    there.mkdir()
    ResultMirror(google, there, ["out/*.jsonl"], "run/results").restore()
    assert (there / "out" / "answers.jsonl").read_text() == "1\n2\n"
    assert not list(there.rglob("*.part"))


def test_what_is_not_what_its_name_says_is_not_installed(google):
    good = f"content/{hashlib.sha256(b'x').hexdigest()}/w.whl"
    google.found[good] = b"x"
    assert install.fetch(google, good) == b"x"
    google.found[good] = b"y"
    with pytest.raises(install.InstallFailed, match="not what its name says"):
        install.fetch(google, good)
    with pytest.raises(install.InstallFailed, match="missing"):
        install.fetch(google, "content/00/none.whl")


def test_an_installation_is_made_once_for_a_lock_and_a_wheel(google, tmp_path):
    ran: list[list[str]] = []

    def run(command: Any) -> int:
        ran.append(list(command))
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        return 0

    for name in ("w.whl", "other.whl", "lock"):
        google.found[f"c/{hashlib.sha256(name.encode()).hexdigest()}/{name}"] = name.encode()
    wheel, other, lock = (next(n for n in google.found if n.endswith(f"/{e}")) for e in ("w.whl", "other.whl", "lock"))
    told = an_assignment(wheel=wheel, lock=lock, apt_packages=["bubblewrap"])
    first = install.install(google, told, tmp_path, run)
    assert ran[1][:3] == ["apt-get", "install", "--yes"] and ran[1][-1] == "bubblewrap"
    assert ran[-1][-1].endswith("w.whl") and ran[-2][-1].endswith("requirements.lock")
    ran.clear()
    assert install.install(google, told, tmp_path, run) == first and ran == [], "warm"
    assert install.install(google, an_assignment(wheel=other, lock=lock), tmp_path, run) != first and ran
    with pytest.raises(install.InstallFailed, match="exited with 1"):
        install.install(google, an_assignment(wheel=wheel, lock=other), tmp_path, lambda command: int("pip" in command))


def test_who_holds_a_chip_is_killed(tmp_path):
    """A process list of links, with a real process behind one of them."""
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    proc = tmp_path / "proc"
    for pid, target in ((holder.pid, "/dev/vfio/3"), (os.getpid(), "/dev/vfio/3"), (999_999_999, "/dev/null")):
        (proc / str(pid) / "fd").mkdir(parents=True)
        (proc / str(pid) / "fd" / "5").symlink_to(target)
        (proc / str(pid) / "cmdline").write_bytes(b"/elsewhere/python\0train.py")
    try:
        assert install.free_chips(only_below=Path("/var/lib/qwq_jax"), proc=proc) == [], "not ours on another's VM"
        assert install.free_chips(proc=proc) == [holder.pid]
        assert holder.wait(timeout=10) == -signal.SIGKILL
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("broken", [2, 100])
def test_an_answer_that_breaks_off_is_asked_for_again_and_is_an_oserror(monkeypatch, broken):
    tries = iter(range(1000))

    class Answer(io.BytesIO):
        def read(self, *arguments: Any) -> bytes:
            if next(tries) < broken:
                raise http.client.IncompleteRead(b"ha", 2)
            return b"half"

    monkeypatch.setattr("urllib.request.urlopen", lambda request, timeout: Answer())
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    google = Google(Endpoints())
    if broken == 2:
        assert google.metadata("x") == "half"
    else:
        with pytest.raises(OSError, match="IncompleteRead"):
            google.metadata("x")


def test_which_worker_this_is(google):
    google.attributes = {
        "agent-worker-number": "2",
        "worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3,u:u:10.0.0.4,u:u:10.0.0.5",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_NUM_SLICES: '2'\n",
    }
    place = _place(google, an_assignment(cpu=False))
    assert (place.index, place.count, place.coordinator) == (6, 8, None)
    assert _place(google, an_assignment()).coordinator == ("10.0.0.2", 8476 + 16)


# The agent forks for what it has to do in its child. It never has JAX beside it, as other tests of this process may.
@pytest.mark.filterwarnings("ignore:os.fork\\(\\) was called:RuntimeWarning")
class TestAgent:
    """Rounds of a shell script in the place of qwq-jax."""

    def agent(
        self, google: Any, tmp_path: Path, script: str, *, index: int = 0, count: int = 1, **changes: Any
    ) -> Agent:
        binaries = tmp_path / "bin"
        binaries.mkdir(exist_ok=True)
        (binaries / "qwq-jax").write_text(f"#!/bin/bash\n{script}\n")
        (binaries / "qwq-jax").chmod(0o755)
        pace = Pace(tick=0.01, check=0.02, mirror=0.02, status=0.1, grace=2.0, straggler=0.3)
        agent = Agent(
            google,
            an_assignment(**changes),
            Place(index, count, None),
            home=tmp_path,
            pace=pace,
            inherited=dict(os.environ),
        )
        (tmp_path / "work-abc123").mkdir(exist_ok=True)
        return agent

    def run(self, agent: Agent, tmp_path: Path) -> Stopped:
        with pytest.raises(Stopped) as stopped:
            agent._rounds(tmp_path / "bin")
        return stopped.value

    def outcome(self, google: MemoryGoogle) -> str:
        return json.loads(google.found["run/outcome.json"])["kind"]

    def test_done(self, google, tmp_path):
        script = 'echo "$GIVEN $JAX_COMPILATION_CACHE_DIR $1 $2"'
        assert self.run(self.agent(google, tmp_path, script), tmp_path).stop.reason is Reason.OVER
        assert self.outcome(google) == "done"
        assert b"1 gs://bucket/cache sft x.toml" in google.found["run/logs/0001-0000-000000.log"]

    def test_interrupted_goes_on_in_place(self, google, tmp_path):
        self.run(self.agent(google, tmp_path, "if [ -f saved ]; then exit 0; fi; touch saved; exit 42"), tmp_path)
        assert self.outcome(google) == "done"
        assert sum(name.endswith("verdict.json") for name in google.found) == 2

    def test_bad_input_is_never_tried_again(self, google, tmp_path):
        self.run(self.agent(google, tmp_path, "echo x >>tries; exit 2"), tmp_path)
        assert self.outcome(google) == "bad-input"
        assert (tmp_path / "work-abc123" / "tries").read_text() == "x\n"

    def test_failures_in_the_record_count(self, google, tmp_path):
        google.found["record.json"] = json.dumps({"uid": "abc123", "attempt": 1, "failures": 1}).encode()
        self.run(self.agent(google, tmp_path, "kill -9 $$"), tmp_path)
        assert self.outcome(google) == "failed"

    def test_a_hanging_job_is_ended(self, google, tmp_path):
        stopped = self.run(self.agent(google, tmp_path, "exec sleep 60", idle_seconds=0.3), tmp_path)
        assert self.outcome(google) == "idle" and stopped.code == 128 + signal.SIGTERM

    def test_the_deadline_ends_one_that_ignores_sigterm(self, google, tmp_path):
        script = "trap '' TERM; while true; do echo busy; sleep 0.05; done"
        stopped = self.run(self.agent(google, tmp_path, script, deadline=time.time() + 0.4), tmp_path)
        assert self.outcome(google) == "deadline" and stopped.code == 128 + signal.SIGKILL

    def test_a_preempted_job_saves_first(self, google, tmp_path):
        google.preempted = "TRUE"
        script = "trap 'exit 42' TERM; while true; do sleep 0.02; done"
        agent = self.agent(google, tmp_path, script)
        agent._next_copy = agent._next_status = 0.0
        stopped = self.run(agent, tmp_path)
        assert stopped.stop.reason is Reason.PREEMPTED
        assert "run/outcome.json" not in google.found

    def test_a_round_is_not_started_twice(self, google, tmp_path, monkeypatch):
        """The VM started again in the middle of it."""
        monkeypatch.setattr(rounds, "FIRST_WAIT", 0.05)
        google.found["run/attempts/0001/rounds/0000/start-0000.json"] = b"{}"
        self.run(self.agent(google, tmp_path, "echo x >>tries; exit 0"), tmp_path)
        assert (tmp_path / "work-abc123" / "tries").read_text() == "x\n", "in the next round only"
        first = json.loads(google.found["run/attempts/0001/rounds/0000/verdict.json"])
        assert first["kind"] == "failed" and self.outcome(google) == "done"

    def test_a_worker_that_is_not_heard_of_counts_as_lost(self, google, tmp_path):
        self.run(self.agent(google, tmp_path, "exit 0", count=2, failures=0), tmp_path)
        assert self.outcome(google) == "failed"

    def test_the_resource_is_deleted_until_the_vm_is_gone_and_anothers_never(self, google, tmp_path):
        agent = self.agent(google, tmp_path, "exit 0")
        stop = self.run(agent, tmp_path).stop
        answers = iter([OSError("503"), None, None])

        def delete(*where: str) -> None:
            google.deleted.append(where)
            if (answer := next(answers)) is not None:
                raise answer
            if len(google.deleted) == 3:
                agent.guard.signalled = True

        google.delete_queued_resource = delete
        agent._leave(stop)
        assert google.deleted == [("p", "z", "job-abc123-1")] * 3
        google.deleted.clear()
        self.agent(google, tmp_path, "exit 0", resource="")._leave(stop)
        assert google.deleted == []
