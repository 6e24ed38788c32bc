"""A VM made ready: packages by the lock, files in place, chips free."""

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from gcp.worker.assignment import Assignment
from gcp.worker.google import Google

# Runs a command to its end, watched, with its output in the log.
Run = Callable[[Sequence[str]], int]

_MARKER = "INSTALLED"
_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3")
_OLD_ENOUGH = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"


class InstallFailed(Exception):
    """The packages cannot be installed; the log has the reason."""


def fetch(google: Google, name: str) -> bytes:
    """Reads a staged object, whose name holds its hash.

    Raises:
        InstallFailed: It is not there, or not what its name says.
    """
    data = google.get(name)
    digest = Path(name).parent.name
    if data is None or hashlib.sha256(data).hexdigest() != digest:
        raise InstallFailed(f"{name} is {'missing' if data is None else 'not what its name says'}")
    return data


def install(google: Google, assignment: Assignment, home: Path, run: Run) -> Path:
    """Makes the environment for this lock and this wheel, or finds it made; returns its ``bin``.

    Raises:
        InstallFailed: A step failed.
    """
    key = hashlib.sha256(f"{assignment.lock} {assignment.wheel}".encode()).hexdigest()[:16]
    environment = home / f"venv-{key}"
    if (environment / _MARKER).exists():
        return environment / "bin"
    if assignment.apt_packages:
        _do(run, ["apt-get", "update", "--quiet"])
        _do(run, ["apt-get", "install", "--yes", "--no-install-recommends", *assignment.apt_packages])
    staged = home / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    wheel, lock = staged / Path(assignment.wheel).name, staged / "requirements.lock"
    wheel.write_bytes(fetch(google, assignment.wheel))
    lock.write_bytes(fetch(google, assignment.lock))
    _make_environment(environment, home, run)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _do(run, [*pip, "--requirement", str(lock)])
    _do(run, [*pip, "--no-deps", "--force-reinstall", str(wheel)])
    (environment / _MARKER).touch()
    return environment / "bin"


def place_files(google: Google, assignment: Assignment, directory: Path) -> None:
    """Puts the job's files where it looks for them."""
    for name, staged in assignment.files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(fetch(google, staged))


def free_chips(*, only_below: "Path | None" = None, proc: Path = Path("/proc")) -> "list[int]":
    """Kills processes that hold a TPU, left over from before a preemption; returns their ids.

    Args:
        only_below: Kill only programs that lie in this directory: on a VM that is its owner's, others are not ours.
        proc: Where Linux lists processes.
    """
    killed = []
    for entry in proc.iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            held = [os.readlink(descriptor) for descriptor in (entry / "fd").iterdir()]
            program = (entry / "cmdline").read_bytes().decode(errors="replace")
            if not any(name.startswith(("/dev/vfio/", "/dev/accel")) for name in held):
                continue
            if only_below is None or str(only_below) in program:
                os.kill(int(entry.name), signal.SIGKILL)
                killed.append(int(entry.name))
        except OSError:
            continue  # gone meanwhile, or another user's
    return killed


def _make_environment(environment: Path, home: Path, run: Run) -> None:
    for candidate in _PYTHONS:
        found = shutil.which(candidate)
        if found and run([found, "-c", _OLD_ENOUGH]) == 0:
            _do(run, [found, "-m", "venv", "--clear", str(environment)])
            return
    # The image's Python is too old, or lacks venv: uv brings its own.
    tools = home / "uv"
    _do(run, ["python3", "-m", "pip", "install", "--quiet", "--target", str(tools), "uv"])
    _do(run, [str(tools / "bin" / "uv"), "venv", "--clear", "--seed", "--python", "3.12", str(environment)])


def _do(run: Run, command: "Sequence[str]") -> None:
    code = run(command)
    if code:
        raise InstallFailed(f"{' '.join(command)} exited with {code}")
