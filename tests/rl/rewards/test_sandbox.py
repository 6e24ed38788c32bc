"""What programs try in the sandbox, and that it stays there: each attempt in each way of keeping them in, timed.

The programs report what they got at, and the tests look at this machine from outside as well.
"""

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from qwq_jax.config.rewards import CodeConfig, Isolation
from qwq_jax.rl.rewards import sandbox as sandbox_module
from qwq_jax.rl.rewards.inside.frames import framed
from qwq_jax.rl.rewards.sandbox import Enclosure, Lost, Sandbox, Style
from qwq_jax.rl.rewards.seccomp import _CALLS, call_filter
from tests.rl.rewards.replies import all_end, descendants, own_descendants

ROOT = Path(__file__).parents[3]
CONFIG = CodeConfig(test_seconds=5.0, memory_mib=256, output_kib=64, scratch_mib=4, threads=8)
# For programs that are to be stopped by time.
HURRIED = CONFIG.model_copy(update={"test_seconds": 0.3})
# What a start and the killing may take, beside the time of the test, on a machine that has more to do.
AROUND = 2.0


def styles():
    if shutil.which("bwrap") is None:
        return []
    return [Style.OTHER_USER, Style.USER_NAMESPACE] if os.geteuid() == 0 else [Style.USER_NAMESPACE]


def each_style():
    """The one that is used by default, and the other in slow tests."""
    first, *more = styles() or [Style.USER_NAMESPACE]
    return [
        pytest.param(first, id=first.name),
        *(pytest.param(one, id=one.name, marks=pytest.mark.slow) for one in more),
    ]


@pytest.fixture(scope="module", params=each_style())
def enclosure(request):
    if shutil.which("bwrap") is None:
        pytest.skip("bwrap is not installed")
    made = Enclosure(request.param, shutil.which("bwrap") or "", can_write=True)
    try:
        with Sandbox(made, CONFIG) as sandbox:
            sandbox.try_out()
    except Lost as lost:
        pytest.skip(f"no sandbox of this kind here: {lost}")
    return made


class Unfiltered(Enclosure):
    """Without the filter of system calls, to see that what lies behind it holds too."""

    def settings(self, config):
        return {**super().settings(config), "filter": ""}


def unfiltered(enclosure):
    return Unfiltered(enclosure.style, enclosure.bwrap, enclosure.can_write)


def run(enclosure, program, stdin="", config=CONFIG):
    """The report on one run; everything that was started must be gone afterwards, within the bound."""
    started, before = time.monotonic(), own_descendants()
    with Sandbox(enclosure, config) as sandbox:
        sandbox.ask({"do": "load", "program": program})
        below = own_descendants(before)
        try:
            report = sandbox.ask({"do": "run", "stdin": stdin})
        except Lost as lost:
            report = {"ended": "lost", "status": None, "output": "", "note": str(lost)}
    assert all_end(below, 2.0)
    assert time.monotonic() - started < config.test_seconds + AROUND
    return report


def attempts(*tries):
    """A program that makes each attempt, an expression, and prints one line of each: its value, or what it raised."""
    lines = ["import ctypes, errno, os, signal, socket, sys, threading, time"]
    for attempt in tries:
        lines += [f"try: print(repr({attempt}))", "except BaseException as error: print(type(error).__name__, error)"]
    return "\n".join(lines)


def outcomes(enclosure, *tries):
    report = run(enclosure, attempts(*tries))
    assert report["status"] == 0, report
    found = report["output"].splitlines()
    assert len(found) == len(tries)
    return found


def test_an_ordinary_program_runs(enclosure):
    program = "import json, math, threading\nfor line in open(0): print(json.dumps(int(line) * 2), 'é')"
    report = run(enclosure, program, "1\n2\n")
    assert (report["ended"], report["status"], report["output"]) == ("exit", 0, "2 é\n4 é\n")
    assert report["seconds"] < CONFIG.test_seconds


def test_fork_bomb(enclosure):
    program = """
import os, subprocess, multiprocessing
for _ in range(10000):
    try: os.fork()
    except OSError as error: last = error
try: subprocess.run(["/python/bin/python3", "-c", "1"])
except OSError as error: print(error)
while True:
    try: os.fork()
    except OSError: pass
"""
    before = own_descendants()
    with Sandbox(enclosure, HURRIED.model_copy(update={"test_seconds": 0.6})) as sandbox:
        sandbox.ask({"do": "load", "program": program})
        sandbox.send({"do": "run", "stdin": ""})
        time.sleep(0.3)
        # bubblewrap and its init, the supervisor, and one program.
        assert len(own_descendants(before)) <= 4
        report = sandbox.receive(seconds=5)
    assert report["ended"] == "time"
    assert "not permitted" in report["output"] or report["output"] == ""


def test_fork_bomb_without_the_filter(enclosure):
    """The limit on tasks holds by itself, for a user who is not root; and all die with the sandbox."""
    if enclosure.style is not Style.OTHER_USER and os.geteuid() == 0:
        pytest.skip("the kernel does not count root's tasks")
    program = """
import os, time
while True:
    try: os.fork()
    except OSError: time.sleep(0.01)
"""
    before = own_descendants()
    with Sandbox(unfiltered(enclosure), CONFIG) as sandbox:
        sandbox.ask({"do": "load", "program": program})
        sandbox.send({"do": "run", "stdin": ""})
        time.sleep(0.5)
        below = own_descendants(before)
        assert 4 < len(below) <= CONFIG.threads + 6
    assert all_end(below, 2.0)


def test_thread_bomb(enclosure):
    program = """
import threading, time
count = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
        count += 1
except RuntimeError: print(count)
"""
    report = run(enclosure, program)
    assert report["ended"] == "exit"
    if enclosure.style is Style.OTHER_USER or os.geteuid():
        assert 1 <= int(report["output"]) <= CONFIG.threads + 1


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10 ** 10)",
        pytest.param("x = []\nwhile True: x.append(bytearray(1 << 20))", marks=pytest.mark.slow),
        pytest.param("import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(100)]", marks=pytest.mark.slow),
        pytest.param("x = 'x'\nwhile True: x += x", marks=pytest.mark.slow),
        pytest.param(
            "import ctypes\nx = [ctypes.create_string_buffer(1 << 24) for _ in range(1000)]", marks=pytest.mark.slow
        ),
    ],
)
def test_memory_bomb(enclosure, program):
    report = run(enclosure, program)
    assert report["ended"] == "exit" and report["status"] != 0
    assert "MemoryError" in report["note"] or "Cannot allocate" in report["note"], report


def test_memory_outside_the_address_space(enclosure):
    """Files in memory and shared segments would not count as the program's own."""
    found = outcomes(
        enclosure,
        "os.memfd_create('x')",
        "ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600)",
        "open('/dev/shm/x', 'wb')",
        "__import__('multiprocessing.shared_memory', fromlist=['x']).SharedMemory(create=True, size=1 << 30)",
    )
    assert found[0].startswith("PermissionError") and found[1] == "-1"
    assert all(line.split()[0] in ("FileNotFoundError", "OSError", "PermissionError") for line in found[2:])


def test_disk_bomb(enclosure):
    program = """
written, data = 0, bytes(1 << 16)
for index in range(1000):
    try:
        with open(f"/work/{index}", "wb", buffering=0) as file:
            while True: written += file.write(data)
    except OSError as error: last = error.strerror
print(written, last)
"""
    written, reason = run(enclosure, program)["output"].split(maxsplit=1)
    assert int(written) <= CONFIG.scratch_mib << 20
    assert reason.strip() in ("No space left on device", "File too large")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "import os\nos.close(1)\nos.close(2)\nwhile True: pass",
        pytest.param(
            "import signal\nfor n in {10, 14, 15, 24}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
            marks=pytest.mark.slow,
        ),
        pytest.param("9 ** 9 ** 9", marks=pytest.mark.slow),
        pytest.param(
            "import threading\nwhile True: threading.Thread(target=lambda: None).start()", marks=pytest.mark.slow
        ),
        pytest.param(
            "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()", marks=pytest.mark.slow
        ),
        pytest.param("import atexit, time\natexit.register(time.sleep, 1000)", marks=pytest.mark.slow),
        pytest.param("input()\ninput()\nwhile True: pass", marks=pytest.mark.slow),
    ],
)
def test_endless_loop(enclosure, program):
    started = time.monotonic()
    report = run(enclosure, program, "1\n2\n", config=HURRIED)
    assert report["ended"] == "time"
    assert HURRIED.test_seconds <= time.monotonic() - started


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(enclosure, stream):
    config = CONFIG if stream == "stdout" else HURRIED
    report = run(enclosure, f"import sys\nwhile True: sys.{stream}.write('x' * 10000)", config=config)
    assert report["ended"] == ("output" if stream == "stdout" else "time")
    assert len(report["output"]) <= CONFIG.output_kib * 1024 and len(report["note"]) <= 2000
    assert report["seconds"] < 1.0


def test_output_that_is_no_text(enclosure):
    report = run(enclosure, r"import sys; sys.stdout.buffer.write(bytes(range(256)) * 16)")
    assert report["status"] == 0 and len(report["output"]) == 4096


@pytest.mark.parametrize("layer", ["filter", "namespace"])
def test_network(enclosure, layer):
    """The filter refuses sockets; behind it there is no interface to reach anybody by, this machine included."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0qwq-jax-test")
        local.listen()
        port = server.getsockname()[1]
        chosen = enclosure if layer == "filter" else unfiltered(enclosure)
        found = outcomes(
            chosen,
            f"socket.create_connection(('127.0.0.1', {port}), 0.3)",
            "socket.create_connection(('1.1.1.1', 53), 0.3)",
            "socket.create_connection(('169.254.169.254', 80), 0.3)",
            "socket.socket(socket.AF_UNIX).connect('\\0qwq-jax-test')",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
            "socket.if_nameindex()",
        )
    if layer == "filter":
        assert all(line.startswith("PermissionError") for line in found)
        assert outcomes(enclosure, "socket.socket(40, socket.SOCK_STREAM)")[0].startswith("PermissionError")  # vsock
    else:
        assert "refused" in found[0]
        assert all("unreachable" in line for line in (found[1], found[2], found[4]))
        assert "refused" in found[3]
        assert found[5] == "[(1, 'lo')]"


def test_writing_outside(enclosure, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    places = ["/", "/usr", "/lib", "/python", "/python/lib", "/harness", "/dev", "/packages", "/tmp", "/etc", "/root"]
    places += [str(tmp_path), os.getcwd()]
    found = outcomes(
        enclosure,
        *(f"open({place + '/written'!r}, 'w')" for place in places),
        *(f"os.mkdir({place + '/made'!r})" for place in places),
        f"open({str(victim)!r}, 'a').write('torn')",
        f"(os.symlink({str(victim)!r}, '/work/link'), open('/work/link', 'r+'))",
        "(os.symlink('/python/lib', '/work/lib'), open('/work/lib/written', 'w'))",
        f"(os.symlink('../../../../..{victim}', '/work/up'), open('/work/up', 'r+'))",
        "os.link('/harness/qwq_jax', '/work/hard')",
        "os.mknod('/work/disk', 0o060666, os.makedev(254, 0))",
        "os.chmod('/python', 0o777)",
        "os.chown('/work', 0, 0)",
        "os.chdir('..') or open('written', 'w')",
    )
    assert all(
        line.split()[0] in ("OSError", "FileNotFoundError", "PermissionError", "NotADirectoryError") for line in found
    ), found
    assert victim.read_text() == "whole" and sorted(tmp_path.iterdir()) == [victim]


def test_reading_secrets(enclosure, tmp_path, monkeypatch):
    secret = "SECRET-60c1"
    monkeypatch.setenv("QWQ_TEST_SECRET", secret)
    file = tmp_path / "secret"
    file.write_text(secret)
    tmp_path.chmod(0o755)
    file.chmod(0o644)
    paths = [str(file), "/etc/passwd", "/etc/shadow", "/root/.bashrc", "/root", "/home", "/proc/self/environ"]
    paths += [
        f"/proc/{os.getpid()}/environ",
        "/proc/1/root/etc/passwd",
        "/proc/self/mem",
        "/sys/class",
        "/run",
        "/var",
        "/boot",
    ]
    paths += ["/tmp", os.getcwd(), "/dev/mem", "/dev/kmsg", "/dev/sda", "/dev/vda", "/dev/tty", "/dev/pts", "/dev/fd/3"]
    found = outcomes(enclosure, "dict(os.environ)", *(f"open({path!r}, 'rb').read(100)" for path in paths))
    assert secret not in found[0] and set(eval(found[0])) <= {"PWD", "LC_CTYPE", "LD_LIBRARY_PATH", "MALLOC_ARENA_MAX"}
    assert all(line.startswith("FileNotFoundError") for line in found[1:]), found
    tree = "sorted({name for place in ('/', '/dev', '/work', '/packages') for name in os.listdir(place)})"
    names = set(eval(outcomes(enclosure, tree)[0]))
    assert names <= {"dev", "harness", "lib", "lib64", "null", "packages", "python", "urandom", "usr", "work", "zero"}
    assert outcomes(enclosure, "os.uname().nodename", "os.getcwd()") == ["'sandbox'", "'/work'"]


def test_open_files_are_not_inherited(enclosure, tmp_path):
    with (tmp_path / "open").open("w+") as file:
        os.set_inheritable(file.fileno(), True)
        program = "[number for number in range(3, 1000) if not os.set_inheritable(number, False)]"
        checks = "[n for n in range(3, 1000) if (lambda: ctypes.CDLL(None).fcntl(n, 1))() != -1]"
        assert outcomes(enclosure, checks, program) == ["[]", "OSError [Errno 9] Bad file descriptor"]


def test_a_module_that_is_called_has_its_own_channel_only(enclosure):
    program = "import ctypes\ndef f(): return [n for n in range(1000) if ctypes.CDLL(None).fcntl(n, 1) != -1]"
    with Sandbox(enclosure, CONFIG) as sandbox:
        sandbox.ask({"do": "load", "program": program})
        handle = sandbox.ask({"do": "open"})["names"]["f"]["value"]
        answer = sandbox.ask({"do": "ask", "question": {"call": handle, "args": [], "kwargs": {}}})
    assert answer["value"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "attack",
    [
        "os.kill(os.getppid(), signal.SIGKILL)",
        "os.kill(1, signal.SIGKILL)",
        "os.kill(-1, signal.SIGKILL)",
        pytest.param("os.killpg(0, signal.SIGKILL)", marks=pytest.mark.slow),
        pytest.param("os.kill({outside}, signal.SIGKILL)", marks=pytest.mark.slow),
        pytest.param("[os.kill(n, signal.SIGSTOP) for n in range(1, 40) if n != os.getpid()]", marks=pytest.mark.slow),
    ],
)
def test_killing_the_parent(enclosure, attack):
    """It may reach the sandbox it is in, which then is lost, but nothing outside: this process is still here."""
    program = f"import os, signal\ntry: {attack.format(outside=os.getpid())}\nexcept OSError as error: print(error)\n"
    started, before = time.monotonic(), own_descendants()
    with Sandbox(enclosure, HURRIED) as sandbox:
        sandbox.ask({"do": "load", "program": program})
        below = own_descendants(before)
        with contextlib.suppress(Lost):
            sandbox.ask({"do": "run", "stdin": ""})
    assert all_end(below, 2.0)
    assert time.monotonic() - started < HURRIED.test_seconds + 1.0 + AROUND


def test_no_way_to_more_rights(enclosure):
    found = outcomes(
        enclosure,
        "os.setuid(0)",
        "os.setgid(0)",
        "os.setgroups([0])",
        "os.getresuid()[0] == os.getresuid()[2] and os.getuid() != 0",
        "ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)",  # PR_GET_NO_NEW_PRIVS
        # capget: nothing effective, permitted or inheritable.
        "(lambda sets: ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets) or sum(sets))"
        "((ctypes.c_uint32 * 6)())",
        "__import__('resource').setrlimit(__import__('resource').RLIMIT_AS, (-1, -1))",
        "os.nice(-10)",
    )
    # Invalid where a namespace does not even have the number.
    assert all(line.startswith(("PermissionError", "OSError [Errno 22]")) for line in found[:3]), found
    assert found[3:6] == ["True", "1", "0"]
    assert found[6].startswith("ValueError") and found[7].startswith("PermissionError")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of one architecture")
def test_every_filtered_call_is_refused(enclosure):
    numbers = {name: pair[0] for name, pair in _CALLS.items()}
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {numbers!r}.items():
    ctypes.set_errno(0)
    print(name, libc.syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno())
print("clone3", libc.syscall(435, 0, 0), ctypes.get_errno())
print("x32", libc.syscall(0x40000000 + 57), ctypes.get_errno())
"""
    lines = [line.split() for line in run(enclosure, program)["output"].splitlines()]
    assert {name: (value, number) for name, value, number in lines} == {
        **dict.fromkeys(numbers, ("-1", "1")),
        "clone3": ("-1", "38"),
        "x32": ("-1", "1"),
    }


@pytest.mark.parametrize("column", [0, 1])
def test_numbers_of_calls_are_those_of_the_kernel(column):
    header = ["/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h"][column]
    if not os.path.exists(header):
        pytest.skip(f"{header} is not here")
    with open(header, encoding="utf-8") as file:
        words = [line.split() for line in file if line.startswith("#define __NR")]
    known = {word[1].removeprefix("__NR_").removeprefix("__NR3264_"): word[2] for word in words if len(word) > 2}
    ours = {name: pair[column] for name, pair in _CALLS.items()}
    assert ours == {name: int(known[name]) if name in known else None for name in _CALLS}


def test_machines_without_a_filter():
    assert call_filter("riscv64") is None
    assert len(call_filter("x86_64") or b"") % 8 == 0


def test_nothing_stays_in_the_background(enclosure):
    program = """
import os, threading, time
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
python = "/python/bin/python3"
for attempt in (os.fork, lambda: os.posix_spawn(python, ["p"], {}), lambda: os.execv(python, ["p"])):
    try: attempt()
    except OSError as error: print(error.errno)
os.setsid()
"""
    with Sandbox(enclosure, CONFIG) as sandbox:
        sandbox.ask({"do": "load", "program": program})
        before = own_descendants()
        report = sandbox.ask({"do": "run", "stdin": ""})
        assert report["output"].split()[:3] == ["1", "1", "1"], report
        assert own_descendants() == before


def test_a_later_program_sees_nothing_of_an_earlier_one(enclosure):
    """But for files in /work: memory, modules and the interpreter are new."""
    with Sandbox(enclosure, CONFIG) as sandbox:
        first = "import builtins, sys, math\nbuiltins.print = None\nmath.pi = 3\nsys.modules['json'] = 5"
        sandbox.ask({"do": "load", "program": first})
        assert sandbox.ask({"do": "run", "stdin": ""})["status"] == 0
        sandbox.ask({"do": "load", "program": "import json, math\nprint(math.pi > 3, json.dumps(1))"})
        assert sandbox.ask({"do": "run", "stdin": ""})["output"] == "True 1\n"


def test_crashes_are_reports(enclosure):
    for program, status in (
        ("import ctypes\nctypes.string_at(0)", -11),
        ("import os\nos.abort()", -6),
        ("import sys\nsys.exit(3)", 3),
        ("import os\nos._exit(4)", 4),
        ("raise KeyboardInterrupt", -2),
    ):
        assert run(enclosure, program)["status"] == status, program


HOLDER = """
import time
from qwq_jax.config.rewards import CodeConfig
from qwq_jax.rl.rewards.sandbox import Enclosure, Sandbox, Style

sandbox = Sandbox(Enclosure(Style.{style}, {bwrap!r}), CodeConfig(test_seconds=60.0))
sandbox.ask({{"do": "load", "program": "while True: pass"}})
sandbox.send({{"do": "run", "stdin": ""}})
print("started", flush=True)
time.sleep(100)
"""


def test_killing_this_process_kills_the_sandbox(enclosure):
    """As the kernel does it: the process that has the sandbox is killed without a chance to clean up."""
    script = HOLDER.format(style=enclosure.style.name, bwrap=enclosure.bwrap)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"started\n"
        time.sleep(0.2)
        below = descendants(holder.pid)
        assert len(below) >= 4
        holder.kill()
        holder.wait()
    assert all_end(below, 2.0)


def test_the_whole_has_a_deadline(enclosure):
    with Sandbox(enclosure, CONFIG, time.monotonic() + 0.5) as sandbox:
        sandbox.ask({"do": "load", "program": "while True: pass"})
        started = time.monotonic()
        with pytest.raises(Lost, match="too long"):
            sandbox.ask({"do": "run", "stdin": ""})
        assert time.monotonic() - started < 0.6


def test_scratch_can_be_left_out(enclosure):
    for made, config in (
        (enclosure, CONFIG.model_copy(update={"scratch_mib": 0})),
        (Enclosure(enclosure.style, enclosure.bwrap, can_write=False), CONFIG),
    ):
        report = run(made, "open('/work/x', 'w').write('x')", config=config)
        assert "Read-only" in report["note"] or "File too large" in report["note"]


def test_packages_are_bound(enclosure, tmp_path):
    (tmp_path / "lent.py").write_text("value = 7")
    tmp_path.chmod(0o755)
    config = CONFIG.model_copy(update={"packages": (str(tmp_path),)})
    assert run(enclosure, "import lent; print(lent.value, lent.__file__)", config=config)["output"] == (
        "7 /packages/0/lent.py\n"
    )


class TestRefusal:
    """Without a sandbox nothing runs, unless the configuration says so in so many words."""

    def test_without_bubblewrap(self, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(ValueError, match='bwrap.* was not found: install bubblewrap, .*"none-i-trust-this-code"'):
            Enclosure.find(CONFIG)

    def test_where_it_fails(self, monkeypatch, tmp_path):
        fake = tmp_path / "bwrap"
        fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
        fake.chmod(0o755)
        monkeypatch.setattr(shutil, "which", lambda name: str(fake))
        with pytest.raises(ValueError, match="cannot make a sandbox here .*No permissions to create"):
            Enclosure.find(CONFIG)

    def test_on_a_machine_whose_calls_are_not_known(self, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/bwrap")
        monkeypatch.setattr(sandbox_module, "call_filter", lambda machine: None)
        with pytest.raises(ValueError, match="no filter of system calls"):
            Enclosure.find(CONFIG)

    def test_trusted_code_has_limits_all_the_same(self, tmp_path):
        config = CONFIG.model_copy(update={"sandbox": Isolation.NONE})
        enclosure = Enclosure.find(config)
        assert enclosure.style is Style.PLAIN
        assert run(enclosure, "import os; print(sorted(os.environ))")["output"] == "['LC_CTYPE', 'MALLOC_ARENA_MAX']\n"
        assert run(enclosure, "while True: pass", config=HURRIED)["ended"] == "time"
        assert run(enclosure, "x = bytearray(10 ** 10)")["note"].endswith("MemoryError\n")
        assert run(enclosure, "while True: print('x' * 1000)")["ended"] == "output"
        forked = run(enclosure, "import os, time\nif not os.fork(): time.sleep(100)")
        assert "not permitted" in forked["note"]


def test_a_supervisor_that_lies_is_not_believed(monkeypatch):
    """Whatever comes out, only a report of the right kind and size is taken."""
    enclosure = Enclosure(Style.PLAIN)
    for bytes_out, reason in (
        (b"\xff\xff\xff\xff", "a message of 4294967295 bytes"),
        (framed({"x": 1})[:-1], "it ended"),
        (b"\x00\x00\x00\x01[", "Expecting value"),
        (b"\x00\x00\x00\x02[]", "no object"),
        (b"\x00\x01\x00\x00" + b"[" * 65536, "too deep"),
        (b"", "it ended"),
    ):
        script = f"import os; os.write(1, {bytes_out!r})"
        monkeypatch.setattr(Enclosure, "command", lambda self, config, script=script: ["python3", "-c", script])
        with pytest.raises(Lost, match=reason):
            Sandbox(enclosure, CONFIG).close()


def test_the_default_is_found():
    if not styles():
        pytest.skip("bwrap is not installed")
    assert Enclosure.find(CONFIG).style is styles()[0]
    assert Counter(style.name for style in Style) == {"OTHER_USER": 1, "USER_NAMESPACE": 1, "PLAIN": 1}
