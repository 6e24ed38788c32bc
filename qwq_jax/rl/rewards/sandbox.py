"""A sandbox for programs that a model wrote: bubblewrap's namespaces, limits of the kernel, and a filter of its calls.

Inside there is an interpreter, the C library, three devices and a directory for files that is bounded and forgotten;
no network, no ``/proc``, no other process than those of the sandbox, no environment, no capability, and no user that
means anything outside. Time is measured out here: when it is over the whole sandbox is killed, whatever is in it. So
it is when this process ends.
"""

import base64
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self

from qwq_jax.config.rewards import CodeConfig, Isolation
from qwq_jax.rl.rewards.inside.frames import Message, framed, receive, send
from qwq_jax.rl.rewards.seccomp import call_filter

_INSIDE = "qwq_jax/rl/rewards/inside"
_PACKAGE_PARENT = Path(__file__).parents[3]
_MIB = 1 << 20
# Of a message: JSON writes a character in six at most.
_SPREAD = 6
_START_SECONDS = 20.0
# All of it. Each thread would otherwise take an arena of 64 MiB from the address space.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2"}
_MOST_SAID = 300
# Numbers for users that no system gives out; one for each sandbox, so that each has its own count of threads.
_FIRST_USER, _USERS = 2_000_000_000, 100_000_000
_NOBODY = 65534
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
# Made one by one: those that bubblewrap makes on the way to others can be read by their owner alone.
_DIRECTORIES = (
    *("/dev", "/usr", "/python", "/packages", "/harness"),
    *(f"/harness/{parent}" for parent in reversed([*map(str, Path(_INSIDE).parents)][:-1])),
)
_OLDEST_WITH_SIZE = (0, 7)
_HOW = 'install bubblewrap, or, to run it without a sandbox, set sandbox = "none-i-trust-this-code"'


class Lost(Exception):
    """The sandbox was closed: it took too long, ended, or said what it should not; its text says which."""


class Style(Enum):
    """How a program is kept in."""

    OTHER_USER = "other user"
    """By root: namespaces, and a user that is nobody else."""
    USER_NAMESPACE = "user namespace"
    """By anybody, where the system lets them make user namespaces."""
    PLAIN = "plain"
    """Not: a process with limits."""


@dataclass(frozen=True)
class Enclosure:
    """How sandboxes are made on this machine.

    Attributes:
        style: How a program is kept in.
        bwrap: The program of bubblewrap; empty if none is used.
        can_write: Whether a directory for files can be bounded, and is therefore there.
    """

    style: Style
    bwrap: str = ""
    can_write: bool = True

    @classmethod
    def find(cls, config: CodeConfig) -> "Enclosure":
        """The strongest way that works here, tried out.

        Raises:
            ValueError: There is none, and `config` does not say that programs are trusted.
        """
        if config.sandbox is Isolation.NONE:
            return cls(Style.PLAIN)
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise ValueError(f"reward code: bwrap, which keeps programs in, was not found: {_HOW}")
        if call_filter(os.uname().machine) is None:
            raise ValueError(
                f"reward code: no filter of system calls for {os.uname().machine}, only x86_64 and aarch64"
            )
        can_write = _version(bwrap) >= _OLDEST_WITH_SIZE
        reasons = []
        for style in [Style.OTHER_USER, Style.USER_NAMESPACE] if os.geteuid() == 0 else [Style.USER_NAMESPACE]:
            enclosure = cls(style, bwrap, can_write)
            try:
                with Sandbox(enclosure, config) as sandbox:
                    sandbox.try_out()
                return enclosure
            except Lost as lost:
                reasons.append(str(lost))
        raise ValueError(f"reward code: bwrap cannot make a sandbox here ({'; '.join(reasons)}): {_HOW}")

    def command(self, config: CodeConfig) -> list[str]:
        """The command line that starts the supervisor."""
        if self.style is Style.PLAIN:
            return [sys.executable, *_start_of(str(_PACKAGE_PARENT))]
        return [
            self.bwrap,
            *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
            *("--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"),
            *self._user(),
            *(part for path in _DIRECTORIES for part in ("--dir", path)),
            *_interpreter(),
            *("--ro-bind", str(_PACKAGE_PARENT / _INSIDE), f"/harness/{_INSIDE}"),
            *(part for index, path in enumerate(config.packages) for part in ("--ro-bind", path, f"/packages/{index}")),
            *(part for name in ("null", "zero", "urandom") for part in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")),
            *self._scratch(config),
            *("--remount-ro", "/", "--chdir", "/work"),
            *("--", "/python/bin/python3", *_start_of("/harness")),
        ]

    def _user(self) -> list[str]:
        if self.style is Style.OTHER_USER:
            return ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # given up with the user, before any program
        return ["--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]

    def _scratch(self, config: CodeConfig) -> list[str]:
        if not (self.can_write and config.scratch_mib):
            return ["--dir", "/work"]
        return ["--perms", "0777", "--size", str(config.scratch_mib * _MIB), "--tmpfs", "/work"]

    def settings(self, config: CodeConfig) -> Message:
        """The limits of programs, for the supervisor."""
        plain = self.style is Style.PLAIN
        steps = call_filter(os.uname().machine) if sys.platform == "linux" else None
        return {
            "seconds": config.test_seconds,
            "memory": config.memory_mib * _MIB,
            "output": config.output_kib * 1024,
            "scratch": config.scratch_mib * _MIB,
            "threads": 0 if plain else config.threads,  # without a user of its own, those of everybody would count
            "filter": base64.b64encode(steps or b"").decode(),
            "parent": os.getpid() if plain else 0,
            "user": _FIRST_USER + secrets.randbelow(_USERS) if self.style is Style.OTHER_USER else 0,
            "packages": list(config.packages)
            if plain
            else [f"/packages/{index}" for index in range(len(config.packages))],
        }


class Sandbox:
    """A started sandbox, to be asked one thing at a time and closed in the end.

    Args:
        enclosure: How it is made.
        config: The limits.
        deadline: Time of ``time.monotonic`` at which nothing is waited for any more.
    """

    def __init__(self, enclosure: Enclosure, config: CodeConfig, deadline: float = float("inf")) -> None:
        self._enclosure, self._config = enclosure, config
        self._deadline = deadline
        self._longest = _SPREAD * config.output_kib * 1024 + _MIB
        self._directory = tempfile.TemporaryDirectory() if enclosure.style is Style.PLAIN else None
        self._process = subprocess.Popen(
            enclosure.command(config),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            cwd=self._directory.name if self._directory else "/",
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._process.stderr.fileno(), False)
        try:
            self.send(enclosure.settings(config), seconds=_START_SECONDS)
            self.receive(seconds=_START_SECONDS)
        except Lost:
            self.close()
            raise

    def ask(self, request: Message, *, tests: float = 1.0) -> Message:
        """Sends a request and waits for its answer, as long as `tests` tests may take and a little longer.

        Raises:
            Lost: It takes longer than that or than the sandbox may exist, or the sandbox has ended.
        """
        self.send(request)
        return self.receive(seconds=tests * self._config.test_seconds + 1.0)

    def send(self, message: Message, *, seconds: float = 10.0) -> None:
        """Sends without waiting for an answer; `Lost` as in `ask`."""
        try:
            send(self._requests, framed(message), self._until(seconds))
        except (OSError, ValueError) as error:
            raise self._lost(error) from None

    def receive(self, *, seconds: float) -> Message:
        """Waits for a message; `Lost` as in `ask`."""
        try:
            return receive(self._replies, most=self._longest, deadline=self._until(seconds))
        except (OSError, EOFError, ValueError) as error:
            raise self._lost(error) from None

    def try_out(self) -> None:
        """Runs a program that prints; raises `Lost` if that does not work."""
        self.ask({"do": "load", "program": "import fractions, json\nprint(json.dumps(6 * 7))"})
        report = self.ask({"do": "run", "stdin": ""})
        if report["output"] != "42\n":
            raise Lost(f"a first program failed: {report['note'].strip()[-200:]}")

    def close(self) -> None:
        """Kills all that is in it."""
        if self._process.returncode is None:
            # In a session of its own, so that without namespaces this reaches what a program has started.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        if self._directory:
            self._directory.cleanup()

    def __enter__(self) -> Self:
        """Nothing more: it is started already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    def _until(self, seconds: float) -> float:
        return min(self._deadline, time.monotonic() + seconds)

    def _lost(self, error: OSError | EOFError | ValueError) -> Lost:
        if isinstance(error, TimeoutError):
            return Lost("it took too long")
        if isinstance(error, ValueError):
            return Lost(str(error))
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        said = (self._process.stderr.read() or b"").decode("utf-8", "replace").strip()
        return Lost(f"it ended{': ' if said else ''}{said[-_MOST_SAID:]}")


def _version(bwrap: str) -> tuple[int, ...]:
    """Such as (0, 8, 0)."""
    words = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=False).stdout.split()
    return tuple(int(part) for part in words[-1].split(".") if part.isdigit()) if words else ()


def _start_of(root: str) -> list[str]:
    """Arguments of Python that import the supervisor from below `root` and start it."""
    code = f"import sys; sys.path.insert(0, {root!r}); from {_INSIDE.replace('/', '.')}.supervisor import main; main()"
    return ["-I", "-B", "-X", "utf8", "-c", code]


def _interpreter() -> list[str]:
    """What binds an interpreter like this one to /python, and the libraries of the system to where they are."""
    base = Path(sys.base_prefix)
    arguments = ["--ro-bind", os.path.realpath(sys.executable), "/python/bin/python3"]
    for name in dict.fromkeys(("lib", sys.platlibdir)):
        arguments += ["--ro-bind", str(base / name), f"/python/{name}"]
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        arguments += ["--setenv", "LD_LIBRARY_PATH", "/python/lib"]
    for path in _LIBRARIES:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    return arguments
