"""The first process in the sandbox: it starts a program once for each test, within limits, and reports what it did.

`sandbox.py` starts it and sends requests. Each but ``load`` forks: the child leaves the loop, takes the limits and the
filter of system calls upon itself and is the program from then on, so that one start of an interpreter serves all
tests, and nothing that a program does to its own process reaches the next. What a right answer would be never comes in
here, but for code that asserts, which has a sandbox to itself.
"""

import base64
import ctypes
import os
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import types
from collections.abc import Callable

from qwq_jax.rl.rewards.inside.frames import HEADER_BYTES, Message, framed, header, read, receive, send
from qwq_jax.rl.rewards.inside.roles import be_module, be_program, be_tests

# Of prctl, from include/uapi/linux/prctl.h and seccomp.h.
_PARENT_DEATH_SIGNAL, _SET_SECCOMP, _NO_NEW_PRIVILEGES, _FILTER_MODE = 1, 22, 38, 2
# _LINUX_CAPABILITY_VERSION_3 of include/uapi/linux/capability.h.
_CAPABILITY_VERSION = 0x20080522
_NOTE_BYTES = 2000
_FILES = 64
# What the limit on threads counts beside them: this process, its child's first thread and the init of the namespace.
_OTHER_TASKS = 3

Job = Callable[[], None]


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent, of process id `parent`, ends; at once if that has happened.

    The parent is the thread that started this process. Linux only; elsewhere a process has to notice by itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


class _Filter(ctypes.Structure):
    """struct sock_fprog of include/uapi/linux/filter.h."""

    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]


def _set_filter(steps: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    program = _Filter(len(steps) // 8, steps)
    if libc.prctl(_SET_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the filter of system calls was not taken")


def _become(user: int) -> None:
    """Becomes another user, for good, with no capability left, not even for programs that it would start."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    version, itself = _CAPABILITY_VERSION, 0
    if ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version, itself), (ctypes.c_uint32 * 6)()):
        raise OSError("capabilities could not be given up")


class Supervisor:
    """Answers requests until there are none; in a child, `serve` returns what the child is to do.

    Args:
        requests: File descriptor that they come from.
        replies: Where answers go.
        settings: ``seconds`` of one test, ``memory``, ``output`` and ``scratch`` in bytes, ``threads`` (0 for no limit)
            and ``filter``, steps of a filter of system calls in base 64 (empty for none).
    """

    def __init__(self, requests: int, replies: int, settings: Message) -> None:
        self._requests, self._replies = requests, replies
        self._settings = settings
        self._pid = os.getpid()
        self._code = compile("", "<program>", "exec")
        self._child = 0
        self._to_child = self._from_child = -1

    def serve(self) -> Job:
        """Answers requests; returns only in a child."""
        while True:
            try:
                request = receive(self._requests)
            except EOFError:
                os._exit(0)
            match request:
                case {"do": "load", "program": program}:
                    job = self._load(program)
                case {"do": "run", "stdin": stdin}:
                    job = self._run(stdin)
                case {"do": "open"}:
                    job = self._open()
                case {"do": "ask", "question": question}:
                    job = self._pass_on(question)
                case {"do": "tests", "code": code, "names": names, "candidate": candidate}:
                    job = self._tests(code, names, candidate)
                case _:
                    raise AssertionError(request)
            if job is not None:
                return job

    def _reply(self, message: Message) -> None:
        send(self._replies, framed(message))

    def _load(self, program: str) -> None:
        self._end_child(None)
        try:
            self._code = compile(program, "<program>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError) as error:
            self._reply({"error": f"{type(error).__name__}: {error}"})
        else:
            self._reply({"error": ""})

    def _run(self, stdin: str) -> Job | None:
        """Lets the program run from standard input to standard output, and reports both and how it ended."""
        self._end_child(None)
        source = _file_of(stdin.encode("utf-8", "surrogateescape"))
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        started = time.monotonic()
        if self._fork():
            for number, fd in enumerate((source, out_end, err_end)):
                os.dup2(fd, number)
            os.closerange(3, 4 * _FILES)
            self._confine()
            code = self._code
            return lambda: be_program(code)
        for fd in (source, out_end, err_end):
            os.close(fd)
        report = self._watch(out, err, started + self._settings["seconds"])
        for fd in (out, err):
            os.close(fd)
        self._reply({**report, "seconds": time.monotonic() - started})
        return None

    def _watch(self, out: int, err: int, deadline: float) -> Message:
        """Reads both streams of the child, to their bounds, until it ends or the time is over."""
        output, note, over, open_fds = bytearray(), bytearray(), "", [out, err]
        most = self._settings["output"]
        while open_fds and not over:
            left = deadline - time.monotonic()
            ready = select.select(open_fds, [], [], left)[0] if left > 0 else []
            if not ready:
                over = "time"
            for fd in ready:
                piece = os.read(fd, 65536)
                if not piece:
                    open_fds.remove(fd)
                elif fd == err:
                    note = (note + piece)[-_NOTE_BYTES:]
                else:
                    output += piece
                    over = "output" if len(output) > most else over
        status = self._end_child(None if over else deadline)
        return {
            "ended": over or ("time" if status is None else "exit"),
            "status": status or 0,
            "output": bytes(output[:most]).decode("utf-8", "replace"),
            "note": bytes(note).decode("utf-8", "replace"),
        }

    def _open(self) -> Job | None:
        """Starts the program as a module whose functions can be called."""
        self._end_child(None)
        down, self._to_child = os.pipe()
        self._from_child, up = os.pipe()
        if self._fork():
            self._keep(down, up)
            code = self._code
            return lambda: be_module(code, 3, 4)
        os.close(down)
        os.close(up)
        os.set_blocking(self._to_child, False)
        return self._pass_on(None)

    def _pass_on(self, question: Message | None) -> None:
        """Hands a question to the child, and its answer back unread."""
        deadline = time.monotonic() + self._settings["seconds"]
        try:
            if self._to_child < 0:
                raise EOFError
            if question is not None:
                send(self._to_child, framed(question), deadline)
            (length,) = struct.unpack("!I", read(self._from_child, HEADER_BYTES, deadline))
            if length > self._settings["output"]:
                self._end_child(None)
                return self._reply({"lost": "output"})
            answer = header(length) + read(self._from_child, length, deadline)
        except TimeoutError:
            self._end_child(None)
            return self._reply({"lost": "time"})
        except (EOFError, BrokenPipeError):
            self._end_child(None)
            return self._reply({"lost": "it died"})
        send(self._replies, answer)

    def _tests(self, code: str, names: Message, candidate: str) -> Job | None:
        """Runs code that asserts; the child speaks to the other side itself until it ends."""
        self._end_child(None)
        if self._fork():
            self._keep(self._requests, self._replies)
            return lambda: be_tests(code, names, candidate, 3, 4)
        status = self._end_child(time.monotonic() + self._settings["seconds"])
        self._reply({"ended": "time" if status is None else "exit", "status": status or 0})
        return None

    def _fork(self) -> bool:
        """Whether this is the child now."""
        self._child = os.fork()
        return not self._child

    def _end_child(self, deadline: float | None) -> int | None:
        """Waits for the child until `deadline`, then kills it; its exit status, or None if it had to be killed."""
        for fd in (self._to_child, self._from_child):
            if fd >= 0:
                os.close(fd)
        self._to_child = self._from_child = -1
        child, self._child = self._child, 0
        if not child:
            return None
        pause = 0.0005
        while deadline is not None and time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None

    def _keep(self, questions: int, answers: int) -> None:
        """In a child: leaves only two files open, as 3 and 4, and takes the limits."""
        null = os.open(os.devnull, os.O_RDWR)
        # By way of numbers above all others, since one of them may be 3 or 4 already.
        kept = [os.dup2(fd, 3 * _FILES + index) for index, fd in enumerate((null, null, null, questions, answers))]
        for number, fd in enumerate(kept):
            os.dup2(fd, number)
        os.closerange(len(kept), 4 * _FILES)
        self._confine()

    def _confine(self) -> None:
        """In a child: takes the limits upon itself, for good."""
        die_with_parent(self._pid)
        settings = self._settings
        limits = {
            resource.RLIMIT_AS: settings["memory"],
            resource.RLIMIT_CPU: int(settings["seconds"]) + 2,
            resource.RLIMIT_FSIZE: settings["scratch"],
            resource.RLIMIT_NOFILE: _FILES,
            resource.RLIMIT_CORE: 0,
        }
        if settings["threads"]:
            limits[resource.RLIMIT_NPROC] = settings["threads"] + _OTHER_TASKS
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, value))
        if settings["filter"]:
            _set_filter(base64.b64decode(settings["filter"]))


def _file_of(data: bytes) -> int:
    """A file descriptor from which `data` can be read."""
    if sys.platform == "linux":
        fd = os.memfd_create("stdin")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    send(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def main() -> None:
    """Takes the settings, then serves; a child goes on as what it became, and ends as any program does.

    Beside those of `Supervisor`, settings are ``parent`` (a process to end with, or 0), ``user`` (a number to become,
    or 0) and ``packages`` (directories that programs may import from).
    """
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    settings = receive(requests)
    if settings["parent"]:
        die_with_parent(settings["parent"])
    if settings["user"]:
        _become(settings["user"])
    sys.path[:] = [*sys.path[1:], *settings["packages"]]
    supervisor = Supervisor(requests, replies, settings)
    send(replies, framed({"ready": True}))
    job: types.FunctionType | Job = supervisor.serve()
    job()
