"""Compiles programs for TPUs that are not here, each in a process of its own, and keeps what was learnt.

libtpu writes a program's text where its flags say so, which it reads once a process; and two compilations at a time
use two cores.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
WORKER = "qwq_jax.jobs.plan_worker"
# What the compiler printed last is the reason.
_LINES = 12


@dataclass(frozen=True)
class Request:
    """What one process shall find out.

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


def answer_all(
    requests: Sequence[Request],
    *,
    store: Path,
    workers: int,
    progress: Callable[[Request], None] = lambda request: None,
) -> list[dict[str, Any]]:
    """What the requests' processes found out, in their order; kept answers cost nothing.

    Args:
        requests: What to find out.
        store: Directory of kept answers.
        workers: Processes at a time.
        progress: Told of each that is done.

    Raises:
        ValueError: The job cannot be compiled so; the sentence says why.
        CompilerFailed: Something else went wrong.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(_answer, request, store): index for index, request in enumerate(requests)}
        answers: list[dict[str, Any]] = [{} for _ in requests]
        try:
            for done in as_completed(waiting):
                answers[waiting[done]] = done.result()
                progress(requests[waiting[done]])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return answers


def is_kept(request: Request, store: Path) -> bool:
    """Whether the answer is there already."""
    return _place(request, store).exists()


def _answer(request: Request, store: Path) -> dict[str, Any]:
    place = _place(request, store)
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    done = subprocess.run(
        [sys.executable, "-m", WORKER], input=request.text, capture_output=True, text=True, check=False
    )
    if done.returncode == 2:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise CompilerFailed(f"{request.task}: " + "\n".join(done.stderr.strip().splitlines()[-_LINES:]))
    answer = json.loads(done.stdout.splitlines()[-1])
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
