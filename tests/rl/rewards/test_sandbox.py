"""What programs take too much of in the sandbox, and how it begins and ends: timed, and looked at from outside."""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest

from qwq_jax.config.rewards import Isolation
from qwq_jax.rl.rewards import sandbox as sandbox_module
from qwq_jax.rl.rewards.inside.frames import framed
from qwq_jax.rl.rewards.sandbox import Enclosure, Lost, Sandbox, Style
from tests.rl.rewards.enclosures import CONFIG, HURRIED, ROOT, each_style, outcomes, possible, run, styles, unfiltered
from tests.rl.rewards.replies import all_end, descendants, own_descendants


@pytest.fixture(scope="module", params=each_style())
def enclosure(request):
    return possible(request.param)


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
        # One that has ended when it is written to has ended, whatever it said before.
        wait = "" if reason == "it ended" else "; os.read(0, 1)"
        script = f"import os; os.write(1, {bytes_out!r}){wait}"
        monkeypatch.setattr(Enclosure, "command", lambda self, config, script=script: ["python3", "-c", script])
        with pytest.raises(Lost, match=reason):
            Sandbox(enclosure, CONFIG).close()


def test_the_default_is_found():
    if not styles():
        pytest.skip("bwrap is not installed")
    assert Enclosure.find(CONFIG).style is styles()[0]
    assert Counter(style.name for style in Style) == {"OTHER_USER": 1, "USER_NAMESPACE": 1, "PLAIN": 1}
