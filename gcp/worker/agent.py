"""The life of one VM: install, rounds of the job until there is a verdict to stop, then away with everything."""

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gcp.worker import install, rounds
from gcp.worker.assignment import Assignment
from gcp.worker.google import Conflict, Google
from gcp.worker.guard import Guard, Reason, Stop, conclude
from gcp.worker.mirror import LogMirror, ResultMirror

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """Which worker this is.

    Attributes:
        index: From 0 on, over all slices.
        count: Of all workers.
        coordinator: Address of the first one, where TPU metadata does not tell JAX; its port is that of round 0.
    """

    index: int
    count: int
    coordinator: "tuple[str, int] | None"


@dataclass(frozen=True)
class Pace:
    """Seconds.

    Attributes:
        tick: Between looks at the running process.
        check: Between looks at the bucket and the metadata server.
        mirror: Between copies of logs and results.
        status: Between signs of life.
        grace: For the job to save and exit after SIGTERM.
        straggler: That the first worker waits for the others' exit codes after its own.
    """

    tick: float = 1.0
    check: float = 10.0
    mirror: float = 5.0
    status: float = 30.0
    grace: float = 120.0
    straggler: float = 300.0


class Stopped(Exception):
    """The guard said stop; whatever ran has ended."""

    def __init__(self, stop: Stop, code: "int | None" = None) -> None:
        super().__init__(stop.reason.value)
        self.stop = stop
        self.code = code


class Agent:
    """One attempt on one VM."""

    def __init__(
        self,
        google: Google,
        assignment: Assignment,
        place: Place,
        *,
        home: Path,
        pace: Pace,
        inherited: "dict[str, str]",
    ) -> None:
        self._google = google
        self._assignment = assignment
        self._place = place
        self._home = home
        self._inherited = inherited
        self._pace = pace
        self._work = home / f"work-{assignment.uid}"
        self._log = home / f"log-{assignment.uid}-{assignment.attempt:04d}"
        name = f"{assignment.run}/logs/{assignment.attempt:04d}-{place.index:04d}"
        self._logs = LogMirror(google, self._log, name)
        patterns = assignment.results if place.index == 0 else []
        self._results = ResultMirror(google, self._work, patterns, f"{assignment.run}/results")
        self.guard = Guard(google, assignment, clock=time.time, period=pace.check)
        self._state = "booting"
        self._next_copy = self._next_status = 0.0

    def run(self) -> None:
        """Does everything; returns when the VM has nothing left to do."""
        self._work.mkdir(parents=True, exist_ok=True)
        try:
            while True:
                try:
                    self._rounds(self._prepare())
                except install.InstallFailed as error:
                    self._note(f"error: {error}")
                    self._pause(self._settle(self._next_round(), 1))
        except Stopped as stopped:
            self._leave(stopped.stop)

    def _prepare(self) -> Path:
        self._state = "installing"
        self._check()
        below = None if self._assignment.resource else self._home
        for process in install.free_chips(only_below=below):
            self._note(f"killed process {process}, which held a TPU")
        self._results.restore()
        install.place_files(self._google, self._assignment, self._work)
        return install.install(self._google, self._assignment, self._home, self._watched)

    def _rounds(self, binaries: Path) -> None:
        """Runs round after round; leaves by `Stopped`."""
        while True:
            number = self._next_round()
            if self._claim(number):
                self._state = f"round {number}"
                self._note(f"round {number}: {' '.join(self._assignment.command)}")
                code = self._job(binaries, number)
            else:
                # This VM started again in the middle of the round: the job is not started a second time in it.
                code = rounds.LOST
            self._pause(self._settle(number, code))

    def _job(self, binaries: Path, number: int) -> int:
        command = [str(binaries / "qwq-jax"), *self._assignment.command]
        try:
            return self._watched(command, environment=self._environment(binaries, number), job=True)
        except Stopped as stopped:
            if stopped.code is not None:
                self._report(number, stopped.code, preempted=stopped.stop.reason is Reason.PREEMPTED)
            raise

    def _environment(self, binaries: Path, number: int) -> "dict[str, str]":
        inherited = {name: value for name, value in self._inherited.items() if not name.startswith("QWQ_JAX_")}
        paths = [path for path in inherited.pop("PYTHONPATH", "").split(":") if path and not path.endswith(".zip")]
        given = {
            "PATH": f"{binaries}:{inherited.get('PATH', '')}",
            "JAX_COMPILATION_CACHE_DIR": self._assignment.compile_cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
            "PYTHONUNBUFFERED": "1",
        }
        if paths:
            given["PYTHONPATH"] = ":".join(paths)
        if self._assignment.cpu:
            given["JAX_PLATFORMS"] = "cpu"
        if self._place.coordinator is not None and self._assignment.distributed:
            host, port = self._place.coordinator
            # A port of its own for each round: the last one's may still be closing.
            given["JAX_COORDINATOR_ADDRESS"] = f"{host}:{port + number % 16}"
            given["JAX_NUM_PROCESSES"] = str(self._place.count)
            given["JAX_PROCESS_ID"] = str(self._place.index)
        return inherited | given | self._assignment.environment

    def _watched(self, command: "Sequence[str]", environment: "dict[str, str] | None" = None, job: bool = False) -> int:
        """Runs a command with its output in the log, and the guard beside it; returns a shell's exit code.

        Raises:
            Stopped: The guard said stop; the command was asked to end, and then made to.
        """
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                list(command),
                cwd=self._work,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        try:
            while process.poll() is None:
                self._check(job)
                time.sleep(self._pace.tick)
        except Stopped as stopped:
            self._note(f"stopping: {stopped.stop.reason.value}")
            raise Stopped(stopped.stop, self._end(process)) from None
        return _shell_code(process.returncode)

    def _end(self, process: "subprocess.Popen[bytes]") -> int:
        """SIGTERM, time to save, then SIGKILL to all that it started."""
        process.send_signal(signal.SIGTERM)
        until = time.monotonic() + self._pace.grace
        while process.poll() is None and time.monotonic() < until:
            self._copy()
            time.sleep(self._pace.tick)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return _shell_code(process.wait())

    def _check(self, job: bool = False) -> None:
        """Mirrors and reports what is due, and raises `Stopped` if the guard says so."""
        now = time.monotonic()
        if now >= self._next_copy:
            self._next_copy = now + self._pace.mirror
            self._copy()
        if now >= self._next_status:
            self._next_status = now + self._pace.status
            self._tell_status()
        stop = self.guard.look(self._logs.size if job else None)
        if stop is not None:
            raise Stopped(stop)

    def _pause(self, verdict: rounds.Verdict) -> None:
        """Waits as the verdict says; forever, or until the guard ends it, if it says stop."""
        self._state = verdict.kind
        if not verdict.again and self._place.index == 0:
            self._retry(lambda: conclude(self._google, self._assignment, verdict.kind, verdict.detail, time.time()))
        until = time.time() + verdict.wait if verdict.again else float("inf")
        while time.time() < until:
            self._check()
            time.sleep(self._pace.tick)

    def _settle(self, number: int, code: int) -> rounds.Verdict:
        """Reports this worker's exit, and waits for the first worker's verdict, or gives it."""
        self._copy()
        self._report(number, code)
        since = time.monotonic()
        while True:
            found = self._try_get(f"{self._round(number)}/verdict.json")
            if found is not None:
                return rounds.Verdict(**json.loads(found))
            if self._place.index == 0:
                codes = self._codes(number)
                if len(codes) == self._place.count or time.monotonic() - since > self._pace.straggler:
                    missing = {index: rounds.LOST for index in range(self._place.count)}
                    self._retry(lambda c=missing | codes: self._give_verdict(number, c))
                    continue
            self._check()
            time.sleep(self._pace.tick)

    def _give_verdict(self, number: int, codes: "dict[int, int]") -> None:
        kinds = self._earlier_kinds()
        record = json.loads(self._google.get(self._assignment.record) or b"{}")
        verdict = rounds.rule(
            codes,
            failures=kinds.count("failed") + int(record.get("failures", 0)),
            allowed=self._assignment.failures,
            interruptions=kinds.count("interrupted") + int(record.get("preemptions", 0)),
            bearable=self._assignment.preemptions,
        )
        self._note(f"round {number}: {verdict.kind}, {verdict.detail}")
        self._copy()
        self._put_new(f"{self._round(number)}/verdict.json", verdict.__dict__)

    def _earlier_kinds(self) -> "list[str]":
        """Of all rounds of all attempts of this run."""
        names = [n for n in self._google.list(f"{self._assignment.run}/attempts/") if n.endswith("/verdict.json")]
        return [json.loads(self._google.get(name) or b"{}").get("kind", "") for name in names]

    def _codes(self, number: int) -> "dict[int, int]":
        codes = {}
        try:
            for name in self._google.list(f"{self._round(number)}/exit-"):
                report = json.loads(self._google.get(name) or b"{}")
                codes[int(report["worker"])] = int(report["code"])
        except OSError:
            pass  # looked for again at the next tick
        return codes

    def _next_round(self) -> int:
        number = 0
        while self._retry(lambda n=number: self._google.get(f"{self._round(n)}/verdict.json")) is not None:
            number += 1
        return number

    def _claim(self, number: int) -> bool:
        """Whether this worker may start the job in this round: once."""
        return self._put_new(f"{self._round(number)}/start-{self._place.index:04d}.json", {"at": time.time()})

    def _report(self, number: int, code: int, *, preempted: bool = False) -> None:
        report = {"worker": self._place.index, "code": code, "preempted": preempted}
        self._put_new(f"{self._round(number)}/exit-{self._place.index:04d}.json", report)

    def _put_new(self, name: str, content: object) -> bool:
        """Writes an object that says something once; False if it was said before."""
        try:
            self._retry(lambda: self._google.put(name, json.dumps(content).encode(), only_new=True))
        except Conflict:
            return False
        return True

    def _retry(self, call):
        """Calls until the network lets it through; the guard is looked at between."""
        while True:
            try:
                return call()
            except OSError as error:
                self._note(f"no answer: {error}")
                self._check()
                time.sleep(self._pace.tick)

    def _try_get(self, name: str) -> "bytes | None":
        try:
            return self._google.get(name)
        except OSError:
            return None

    def _round(self, number: int) -> str:
        return f"{self._assignment.place}/rounds/{number:04d}"

    def _copy(self) -> None:
        try:
            self._logs.copy()
            self._results.copy()
        except OSError as error:
            self._note(f"not mirrored: {error}")

    def _tell_status(self) -> None:
        status = {"state": self._state, "at": time.time(), "log_bytes": self._logs.size}
        try:
            self._google.put(
                f"{self._assignment.place}/status-{self._place.index:04d}.json", json.dumps(status).encode()
            )
        except OSError:
            pass  # the next one says the same

    def _leave(self, stop: Stop) -> None:
        """Copies what is left, and deletes the resource, again and again: this may be the only one left to do it."""
        self._state = stop.reason.value
        self._note(f"leaving: {stop.reason.value}")
        self._copy()
        self._tell_status()
        if not (stop.delete and self._assignment.resource):
            return
        if self._place.index:
            # The first worker deletes; the others only if it does not.
            time.sleep(min(self._pace.straggler, 20 * self._pace.tick))
        while True:
            where = (self._assignment.project, self._assignment.zone, self._assignment.resource)
            try:
                self._google.delete_queued_resource(*where)
            except OSError as error:
                self._note(f"not deleted yet: {error}")
            if self.guard.signalled:
                return
            time.sleep(max(self._pace.check, self._pace.tick))

    def _note(self, text: str) -> None:
        """A line of the agent's own in the job's log."""
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%H:%M:%S')} agent {self._place.index}: {text}\n")


def _die_with_parent() -> None:
    """Has Linux kill the job if the agent dies: the next agent must not start a second one beside it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _shell_code(returncode: int) -> int:
    return returncode if returncode >= 0 else 128 - returncode
