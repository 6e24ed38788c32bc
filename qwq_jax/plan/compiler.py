"""Compiles programs for TPUs that are not here, in processes beside this one, and keeps what was learnt.

Two compilations at a time use two cores. A process answers one request after another: what it imports it need not
again.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Any, Self

PACKAGE = Path(__file__).parents[1]
WORKER = "qwq_jax.jobs.plan_worker"
# What the compiler printed last is the reason.
_LINES = 12


@dataclass(frozen=True)
class Request:
    """What a process shall find out.

    Attributes:
        job: The job, its model and its topology, as plain values.
        task: ``"arrays"``, or the name of one of the job's programs.
    """

    job: Mapping[str, Any]
    task: str

    @property
    def text(self) -> str:
        """As JSON, the same for equal ones."""
        return json.dumps({"job": self.job, "task": self.task}, sort_keys=True)


class CompilerFailed(RuntimeError):
    """A process ended without an answer."""


class Workers:
    """Processes that compile, started when there is something to find out, and ended with the `with` block.

    The second one starts with the first, and imports while that one works; others when they are asked.

    Attributes:
        count: Of them, at most.
    """

    def __init__(self, count: int) -> None:
        """Starts none yet."""
        self.count = count
        self._idle: deque[_Worker] = deque()
        self._starting = Lock()
        self._started = False

    def __enter__(self) -> Self:
        """Nothing happens before the first request."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends those that wait for a request; none works on one, for `answer_all` has returned."""
        while self._idle:
            self._idle.pop().end()

    def ask(self, request: Request) -> dict[str, Any]:
        """What a process finds out; called from `count` threads at most.

        Raises:
            ValueError: The job cannot be compiled so; the sentence says why.
            CompilerFailed: Something else went wrong.
        """
        worker = self._take()
        with ExitStack() as failing:
            failing.callback(worker.end)
            found = worker.ask(request)
            failing.pop_all()
        self._idle.append(worker)
        if "refused" in found:
            raise ValueError(found["refused"])
        return found["answer"]

    def _take(self) -> "_Worker":
        with self._starting:
            if not self._started:
                self._idle.extend(_Worker() for _ in range(min(self.count, 2)))
                self._started = True
            return self._idle.pop() if self._idle else _Worker()


class _Worker:
    """One process: a line with a request goes in, and a line with its answer comes out."""

    def __init__(self) -> None:
        # Of this process, because that one is killed: what it writes there must not outlive it.
        self._folder = tempfile.TemporaryDirectory()
        # What a compiler complains of would fill a pipe that nobody reads.
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  closed by `end`
        self._told = 0  # bytes of them, of requests that were answered
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )

    def ask(self, request: Request) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(request.text + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:  # it ended while nothing was asked
            line = ""
        if line.endswith("\n"):
            try:
                answer = json.loads(line)
            except json.JSONDecodeError:
                self._process.kill()
                raise CompilerFailed(f"{request.task}: its process said {line.strip()!r}, which is no answer") from None
            self._told = os.fstat(self._complaints.fileno()).st_size
            return answer
        code = self._process.wait()
        self._complaints.seek(self._told)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        how = f"ended by signal {-code}, which for lack of memory is 9" if code < 0 else f"ended with code {code}"
        raise CompilerFailed("\n".join([f"{request.task}: the process that compiled {how}", *lines[-_LINES:]]))

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()
        self._folder.cleanup()


def answer_all(
    requests: Sequence[Request],
    *,
    store: Path,
    workers: Workers,
    progress: Callable[[Request], None] = lambda request: None,
) -> list[dict[str, Any]]:
    """What processes found out of the requests, in their order; kept answers cost nothing.

    Args:
        requests: What to find out.
        store: Directory of kept answers.
        workers: Who does.
        progress: Told of each that is done.

    Raises:
        ValueError: The job cannot be compiled so; the sentence says why.
        CompilerFailed: Something else went wrong.
    """
    with ThreadPoolExecutor(workers.count) as pool:
        waiting = {pool.submit(_answer, request, store, workers): index for index, request in enumerate(requests)}
        answers: list[dict[str, Any]] = [{} for _ in requests]
        try:
            for done in as_completed(waiting):
                answers[waiting[done]] = done.result()
                progress(requests[waiting[done]])
        finally:  # of what failed or was interrupted, the rest is not begun
            pool.shutdown(cancel_futures=True)
    return answers


def is_kept(request: Request, store: Path) -> bool:
    """Whether the answer is there already."""
    return _place(request, store).exists()


def _answer(request: Request, store: Path, workers: Workers) -> dict[str, Any]:
    place = _place(request, store)
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    answer = workers.ask(request)
    place.parent.mkdir(parents=True, exist_ok=True)
    # Several may write the same answer; none is ever seen half written.
    half = place.with_name(f"{place.name}.{os.getpid()}")
    half.write_text(json.dumps(answer), encoding="utf-8")
    half.replace(place)
    return answer


def _place(request: Request, store: Path) -> Path:
    known = f"{request.text}\n{compilers()}\n{_sources()}"
    return store / f"{hashlib.sha256(known.encode()).hexdigest()}.json"


@cache
def compilers() -> str:
    """Versions that decide what comes out."""
    found = []
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


@cache
def _sources() -> str:
    """Hash of this package: another version of it may make other programs."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
